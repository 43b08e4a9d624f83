"""A plan's table, picture and CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_ppdl.planning import HOPELESS_BELOW, WEAK_BELOW, Forecast
from lightning_ppdl.privacy.accounting import round_up

FILES = ("plan.csv", "plan.png")
_COLOURS = {"hopeless": "red", "weak": "yellow", "workable": "green"}


@dataclass(frozen=True)
class Row:
    """One setting of the sweep, by key, and its forecast."""

    settings: Mapping[str, Any]
    forecast: Forecast


def write_plan(rows: Sequence[Row], directory: Path) -> None:
    """Write ``plan.csv`` and ``plan.png`` into ``directory``."""
    with (directory / "plan.csv").open("w", newline="") as file:
        records = [_record(row) for row in rows]
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    plan_figure(rows).savefig(directory / "plan.png", dpi=150)


def plan_table(rows: Sequence[Row], name: str) -> Table:
    """The plan for the terminal: the total first, its delta and neighbours beside it."""
    first = rows[0].forecast
    noisy = first.noise_multiplier is not None
    table = Table(title=f"privacy={name}: totals of the whole run", title_justify="left", box=SIMPLE_HEAD)
    for key in rows[0].settings:
        table.add_column(key.replace(".", ".\n"), justify="right")
    table.add_column("epsilon" + _at({row.forecast.spent.delta for row in rows}), justify="right")
    table.add_column("epsilon" + _at({row.forecast.stricter.delta for row in rows}), justify="right")
    if noisy:  # the sparse vector mechanism covers any change
        table.add_column("if\nreplaced", justify="right")
        table.add_column("noise\nmultiplier", justify="right")
    table.add_column("SNR of\nan upload", justify="right")
    table.add_column("SNR of\nthe run", justify="right")
    table.add_column("verdict")
    ends_early = any(row.forecast.ends_early for row in rows)
    if ends_early:
        table.add_column("budget")
    if not noisy:
        table.add_column("paper's epsilon\nper parameter", justify="right", style="dim")
    for row in rows:
        cast = row.forecast
        table.add_row(
            *(_short(value) for value in row.settings.values()),
            _short(round_up(cast.spent.epsilon)),
            _short(round_up(cast.stricter.epsilon)),
            *([_short(round_up(cast.replaced)), _short(cast.noise_multiplier)] if noisy else []),
            f"{cast.upload_ratio:.2g}",
            f"{cast.run_ratio:.2g}",
            f"[{_COLOURS[cast.verdict]}]{cast.verdict}[/]",
            *([_budget(cast)] if ends_early else []),
            *([] if noisy else [_short(cast.per_parameter_epsilon)]),
        )
    table.caption = "\n".join(_caption(rows))
    table.caption_justify = "left"
    return table


def plan_figure(rows: Sequence[Row]) -> Figure:
    """The first swept setting against the cost, or the noise that a target needs, and against what is left of
    the signal; a line for each combination of the other swept ones."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    key = next(iter(rows[0].settings), "rounds")
    epsilons = [row.forecast.spent.epsilon for row in rows]
    # Where all meet one target, its price is the noise.
    targeted = rows[0].forecast.noise_multiplier is not None and (
        key == "privacy.epsilon" or max(epsilons) < 1.02 * min(epsilons)
    )
    lines: dict[str, list[tuple[float, Forecast]]] = {}
    for row in rows:
        others = ", ".join(f"{name} {_short(value)}" for name, value in row.settings.items() if name != key)
        lines.setdefault(others, []).append((_position(row.settings.get(key, 0), row, rows), row.forecast))
    for label, points in lines.items():
        at = [x for x, _ in points]
        cost = [(f.noise_multiplier or 0.0) if targeted else f.spent.epsilon for _, f in points]
        left.plot(at, cost, marker="o", label=label)
        right.plot(at, [f.run_ratio for _, f in points], marker="o", label=label)
    spent = rows[0].forecast.spent
    left.set_title("noise multiplier needed" if targeted else f"epsilon, delta {spent.delta:g}", loc="left")
    right.set_title("signal to noise, whole run, at best", loc="left")
    low = min(HOPELESS_BELOW / 10, *(row.forecast.run_ratio / 2 for row in rows))
    right.axhspan(low, HOPELESS_BELOW, color="#c1440e", alpha=0.15, linewidth=0)
    right.axhspan(HOPELESS_BELOW, WEAK_BELOW, color="#e0b000", alpha=0.15, linewidth=0)
    right.text(0.02, 0.03, "hopeless", transform=right.transAxes, color="#c1440e")
    for axes in (left, right):
        _finish(axes, key, rows)
    if len(lines) > 1:
        left.legend(frameon=False)
    figure.suptitle(f"for {spent.neighbours}", fontsize="medium", x=0.01, ha="left")
    return figure


def _finish(axes: Axes, key: str, rows: Sequence[Row]) -> None:
    axes.set_xlabel(key)
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    values = [row.settings.get(key, 0) for row in rows]
    if not all(isinstance(value, int | float) for value in values):
        axes.set_xticks(range(len(rows)), [_short(value) for value in values])
    elif min(values) > 0 and max(values) >= 30 * min(values):
        axes.set_xscale("log")


def _position(value: Any, row: Row, rows: Sequence[Row]) -> float:
    return float(value) if isinstance(value, int | float) else float(rows.index(row))


def _record(row: Row) -> dict[str, Any]:
    cast = row.forecast
    return {
        **row.settings,
        "epsilon": round_up(cast.spent.epsilon),
        "delta": cast.spent.delta,
        "unit": cast.spent.unit,
        "neighbours": cast.spent.neighbours,
        "method": cast.spent.method,
        "second_epsilon": round_up(cast.stricter.epsilon),
        "second_delta": cast.stricter.delta,
        "replacement_epsilon": round_up(cast.replaced),
        "noise_multiplier": cast.noise_multiplier,
        "upload_signal_to_noise": cast.upload_ratio,
        "run_signal_to_noise": cast.run_ratio,
        "verdict": cast.verdict,
        "affordable_rounds": cast.affordable_rounds,
        "per_parameter_epsilon": cast.per_parameter_epsilon,
    }


def _caption(rows: Sequence[Row]) -> list[str]:
    lines = [f"Epsilon is for {rows[0].forecast.spent.neighbours}, over all rounds; rounded up."]
    lines.append(
        "SNR, signal to noise, is the best there can be: every value at its bound, all uploads pointing the "
        f"same way. Below {HOPELESS_BELOW:g} for the run, noise drowns all that could be learnt: hopeless."
    )
    if rows[0].forecast.per_parameter_epsilon is not None:
        lines.append("The paper's figure is for one value of one round, and no guarantee of the run.")
    if any(row.forecast.ends_early for row in rows):
        lines.append(
            "Where the budget ends the run early, all other figures are still for the rounds planned."
        )
    elif all(row.forecast.affordable_rounds is not None for row in rows):
        lines.append("The budget has room for all rounds.")
    return [*lines, *dict.fromkeys(row.forecast.warning for row in rows if row.forecast.warning)]


def _budget(cast: Forecast) -> str:
    if not cast.ends_early:
        return "has room" if cast.affordable_rounds is not None else "none"
    return f"[red]ends after {cast.affordable_rounds:,}\nof {cast.rounds:,} rounds[/]"


def _at(deltas: set[float]) -> str:
    return f"\nat delta {deltas.pop():g}" if len(deltas) == 1 else ""


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and 1 <= abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:.4g}"
