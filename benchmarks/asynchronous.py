"""The asynchronous protocol against round robin, at equal uploaded bytes and equal local work.

The paper's MLP on MNIST, 30 participants with 600 images each whose speeds differ by up to a factor
of three, a tenth of the parameters uploaded after each epoch. Compares merge rules, and shorter rounds
that upload as much less each. Prints accuracy against bytes, and draws asynchronous.png.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from support import paper_job, parser, print_table

from lightning_ppdl.selection import LargestValues
from lightning_ppdl.server.merge import Add, StalenessWeighted
from lightning_ppdl.server.protocol import Asynchronous, RoundRobin
from lightning_ppdl.simulation import simulate

STEPS_AN_EPOCH = 60
SHOWN = (1, 2, 4, 8)  # epochs


@dataclass(frozen=True)
class Case:
    """One line of the table; each epoch is cut into `parts` rounds, which share its upload fraction."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    parts: int = 1


def cases() -> list[Case]:
    return [
        Case("round robin", {"protocol": RoundRobin()}),
        Case(f"asynchronous, default ({type(Asynchronous().default_merge()).__name__})"),
        Case("asynchronous, Add", {"merge": Add()}),
        Case("asynchronous, StalenessWeighted(1)", {"merge": StalenessWeighted()}),
        Case("asynchronous, StalenessWeighted(0.5)", {"merge": StalenessWeighted(0.5)}),
        Case("asynchronous, default, rounds of 20 steps", parts=3),
        Case("asynchronous, default, rounds of 10 steps", parts=6),
        Case("asynchronous, Add, rounds of 10 steps", {"merge": Add()}, parts=6),
    ]


def curve(case: Case, data_root: str | None, fraction: float, epochs: int, seed: int) -> list[list[float]]:
    """[MB uploaded so far, accuracy], one an epoch."""
    length = "epoch" if case.parts == 1 else STEPS_AN_EPOCH // case.parts
    results = simulate(
        paper_job(
            data_root,
            selection=LargestValues(fraction / case.parts),
            rounds=epochs * case.parts,
            round_length=length,
            speed_spread=0.5,
            seed=seed,
            **{"protocol": Asynchronous(), **case.settings},
        )
    )
    sent = 0
    points = []
    for row in results.rows:
        sent += row.uploaded_bytes
        if row.round % case.parts == 0:
            points.append([sent / 1e6, row.accuracy])
    return points


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        xs, ys = zip(*points)
        axes.plot(xs, [100 * y for y in ys], marker="o", label=name)
    axes.set_xlabel("MB uploaded by all participants")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Asynchronous against round robin, 30 participants on MNIST", loc="left")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--fraction", type=float, default=0.1)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--picture", type=Path, default=Path("asynchronous.png"))
    arguments = options.parse_args()
    shown = [epoch for epoch in SHOWN if epoch < arguments.epochs] + [arguments.epochs]
    curves = {}
    rows = []
    for case in cases():
        runs = [
            curve(case, arguments.data_root, arguments.fraction, arguments.epochs, seed)
            for seed in arguments.seeds
        ]
        points = [[mean(values) for values in zip(*epoch)] for epoch in zip(*runs)]
        curves[case.name] = points
        finals = [run[-1][1] for run in runs]
        rows.append(
            [
                case.name,
                *(f"{points[epoch - 1][1]:.1%}" for epoch in shown),
                f"{min(finals):.1%}",
                f"{points[-1][0]:.1f}",
            ]
        )
        print(f"done: {case.name}", flush=True)
    print(f"\naccuracy after so many epochs, mean over seeds {arguments.seeds}; MB uploaded at the end")
    print_table(["", *(f"{epoch}" for epoch in shown), "worst seed", "MB"], rows)
    draw(curves, arguments.picture)
    print(f"drawn: {arguments.picture}")


if __name__ == "__main__":
    main()
