"""Error feedback against none, and quotas for each tensor, at a hundredth of the parameters uploaded.

The paper's MLP on MNIST, 30 participants with 600 images each, eight rounds. Prints the accuracy after
each of the last rounds, mean over seeds, and how the last one compares with plain largest values, seed by
seed. With --public all of it is of training images that no participant holds: so was `ahead` chosen.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import mean, stdev

from support import paper_job, parser, print_table

from lightning_ppdl.data import MNIST, Splits
from lightning_ppdl.partition import IID, held_by_nobody
from lightning_ppdl.randomness import derive_seed
from lightning_ppdl.selection import ErrorFeedback, LargestValues, PerLayer, Selection
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol, RoundRobin, Synchronous
from lightning_ppdl.simulation import SimulationResults, simulate

PARTICIPANTS, RECORDS = 30, 600
PUBLIC = 10_000
TARGET = 1.0  # points
PROTOCOLS: dict[str, type[ExchangeProtocol]] = {
    "round_robin": RoundRobin,
    "asynchronous": Asynchronous,
    "synchronous": Synchronous,
}


@dataclass(frozen=True)
class WithPublicTest:
    """MNIST's training images, and as test set some of those that no participant holds.

    Args:
        root: Folder with MNIST's files.
        seed: Of the simulation, which deals the images out.
    """

    root: str | None
    seed: int

    def load(self) -> Splits:
        splits = MNIST(root=self.root, normalize=True).load()
        labels = splits.train.labels.numpy()
        shares = IID(samples=RECORDS).split(labels, PARTICIPANTS, derive_seed(self.seed, "partition"))
        public = held_by_nobody(shares, len(labels))[:PUBLIC]
        return Splits(splits.train, splits.train.subset(public), splits.input_shape, splits.classes)


def cases(fraction: float, aheads: list[float]) -> dict[str, Selection]:
    largest = LargestValues(fraction)
    return {
        "largest values": largest,
        **{f"error feedback, ahead={ahead:g}": ErrorFeedback(largest, ahead) for ahead in aheads},
        "per layer": PerLayer(largest),
        "error feedback, per layer": ErrorFeedback(PerLayer(largest)),
    }


def run(selection: Selection, arguments: argparse.Namespace, seed: int) -> SimulationResults:
    data = {"data": WithPublicTest(arguments.data_root, seed)} if arguments.public else {}
    return simulate(
        paper_job(
            arguments.data_root,
            participants=PARTICIPANTS,
            partition=IID(samples=RECORDS),
            selection=selection,
            protocol=PROTOCOLS[arguments.protocol](),
            rounds=arguments.rounds,
            seed=seed,
            **data,
        )
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--fraction", type=float, default=0.01)
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--aheads", type=float, nargs="+", default=[0.0, 0.5])
    options.add_argument("--protocol", choices=PROTOCOLS, default="round_robin")
    options.add_argument("--public", action="store_true", help="measure on images that nobody holds")
    arguments = options.parse_args()
    shown = range(max(1, arguments.rounds - 3), arguments.rounds + 1)
    rows = []
    points: dict[str, float] = {}
    without: list[float] = []
    for name, selection in cases(arguments.fraction, arguments.aheads).items():
        runs = [run(selection, arguments, seed) for seed in arguments.seeds]
        finals = [results.rows[-1].accuracy for results in runs]
        without = without or finals
        gained = [100 * (accuracy - other) for accuracy, other in zip(finals, without)]
        rows.append(
            [
                name,
                *(f"{mean(results.rows[round_ - 1].accuracy for results in runs):.2%}" for round_ in shown),
                f"{min(finals):.2%}",
                f"{mean(gained):+.2f}",
                f"{stdev(gained) if len(gained) > 1 else 0:.2f}",
                f"{mean(sum(row.uploaded_bytes for row in results.rows) for results in runs) / 1e6:.2f}",
            ]
        )
        points[name] = mean(gained)
        print(f"done: {name}", flush=True)
    where = "images that nobody holds" if arguments.public else "the test set"
    print(
        f"\n{arguments.protocol}, accuracy on {where} after rounds {shown[0]} to {shown[-1]}, mean over seeds"
    )
    print(f"{arguments.seeds}; points gained over largest values, and their deviation over seeds; MB up")
    print_table(["", *map(str, shown), "worst seed", "points", "deviation", "MB"], rows)
    if arguments.protocol == "round_robin" and not arguments.public:
        name = f"error feedback, ahead={arguments.aheads[-1]:g}"
        verdict = "reached" if points[name] >= TARGET else "MISSED"
        print(f"{name}: {points[name]:+.2f}; target +{TARGET:g}, {verdict}")


if __name__ == "__main__":
    main()
