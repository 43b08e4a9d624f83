"""What a simulation leaves behind: a table of rounds, a summary, a picture, and a closing table."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from lightning_ppdl.privacy.accounting import round_up
from lightning_ppdl.simulation.results import PrivacySummary, RoundRow, SimulationResults

_FILES = ("metrics.csv", "summary.json", "accuracy.png")


def remove_report(directory: Path) -> None:
    """Remove what an earlier run left in ``directory``."""
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)


def write_report(results: SimulationResults, directory: Path) -> None:
    """Write ``metrics.csv``, ``summary.json`` and ``accuracy.png`` into ``directory``."""
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(RoundRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in results.rows)
    (directory / "summary.json").write_text(json.dumps(summary(results), indent=2) + "\n")
    accuracy_figure(results).savefig(directory / "accuracy.png", dpi=150)


def summary(results: SimulationResults) -> dict[str, Any]:
    """The run in a few figures; None where a baseline was not run. Accuracies in [0, 1]."""
    alone = results.standalone.final if results.standalone else None
    return {
        "accuracy": {
            "collaborative": results.rows[-1].accuracy,
            "collaborative_best": max(row.accuracy for row in results.rows),
            "standalone": {
                "mean": mean(alone) if alone else None,
                "min": min(alone) if alone else None,
                "max": max(alone) if alone else None,
            },
            "centralized": results.centralized.final[0] if results.centralized else None,
        },
        "privacy": asdict(results.privacy),
        "uploads": results.uploads,
        "uploaded_bytes": sum(row.uploaded_bytes for row in results.rows),
        "downloaded_bytes": sum(row.downloaded_bytes for row in results.rows),
        "staleness": {"mean": results.staleness_mean, "max": results.staleness_max},
        "seconds": {
            "collaborative": results.seconds,
            "standalone": results.standalone.seconds if results.standalone else None,
            "centralized": results.centralized.seconds if results.centralized else None,
        },
        "parameters": results.parameters,
        "participants": results.participants,
        "rounds": len(results.rows),
        "seed": results.seed,
    }


def privacy_sentence(privacy: PrivacySummary) -> str:
    """What was promised to whom, with its epsilon; or that nothing was."""
    if privacy.epsilon is None:
        return "No noise was added: nothing here is differentially private."
    extra = ""
    if privacy.per_parameter_epsilon is not None:
        extra = f" (The paper's figure, epsilon per released value: {privacy.per_parameter_epsilon:.4g}.)"
    simulated = " The noise follows from a public seed: a simulation of it." if privacy.simulated else ""
    return (
        f"Differential privacy of each {privacy.unit}, over the whole run: epsilon "
        f"{round_up(privacy.epsilon)} at delta {privacy.delta:g}; neighbours: {privacy.neighbours}."
        f"{extra}{simulated}"
    )


def accuracy_figure(results: SimulationResults) -> Figure:
    """Test accuracy over rounds: the collaboration between its two baselines."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rounds = [row.round for row in results.rows]
    if results.centralized:
        axes.plot(
            rounds,
            [100 * accuracy for accuracy in results.centralized.accuracies[0]],
            color="#7a7a7a",
            linestyle="--",
            label="centralised: all data in one place",
        )
    axes.plot(
        rounds,
        [100 * row.accuracy for row in results.rows],
        color="#0b6e4f",
        linewidth=2.5,
        marker="o" if len(rounds) <= 20 else None,
        label="collaborative: data stays, few changes are shared",
    )
    if results.standalone:
        per_round = [
            [100 * accuracy for accuracy in models] for models in zip(*results.standalone.accuracies)
        ]
        axes.plot(
            rounds,
            [mean(models) for models in per_round],
            color="#c1440e",
            label="standalone: mean and range",
        )
        axes.fill_between(
            rounds,
            [min(models) for models in per_round],
            [max(models) for models in per_round],
            color="#c1440e",
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{results.participants} participants, {results.parameters:,} parameters", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def closing_table(results: SimulationResults) -> Table:
    """The same for the terminal."""
    facts = summary(results)
    accuracy = facts["accuracy"]
    table = Table(
        title=f"{results.participants} participants, {len(results.rows)} rounds", title_justify="left"
    )
    table.add_column("")
    table.add_column("test accuracy", justify="right")
    table.add_column("seconds", justify="right")
    rows: list[tuple[str, float, float | None]] = [
        ("collaborative", accuracy["collaborative"], results.seconds)
    ]
    if results.standalone:
        rows.append(("standalone, mean", accuracy["standalone"]["mean"], results.standalone.seconds))
        rows.append(("standalone, best", accuracy["standalone"]["max"], None))
    if results.centralized:
        rows.append(("centralised", accuracy["centralized"], results.centralized.seconds))
    for name, value, seconds in rows:
        table.add_row(name, f"{value:.2%}", "" if seconds is None else f"{seconds:.1f}")
    table.caption = (
        f"{facts['uploads']} uploads, {facts['uploaded_bytes'] / 1e6:.2f} MB up, "
        f"{facts['downloaded_bytes'] / 1e6:.2f} MB down; staleness {results.staleness_mean:.1f} on average, "
        f"{results.staleness_max} at most.\n{privacy_sentence(results.privacy)}"
    )
    table.caption_justify = "left"
    return table
