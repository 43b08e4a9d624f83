"""Record-level privacy beside what it is compared with: training alone, and the paper's mechanism.

Reads the private collaboration's accuracies from `mnist_private.py --json FILE`, measures the rest, and
draws all of it into one picture. Training alone is without noise, on 600 images each: the better of the
paper's networks on pixels, and the same linear model on the same frozen features, whose learning rate is
chosen on the 6,000 images that nobody holds. The paper's mechanism perturbs the uploads of the paper's
MLP, 90 participants, round robin, 10 rounds, released values truncated to gamma as in the paper: once at
the *total* epsilons of the private collaboration, and once at the paper's epsilons *per parameter*, whose
totals are printed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from support import paper_job, parser, print_table
from support.private_digits import Loaded, measured_on_public_images, scattered_mnist

from lightning_ppdl.data import Splits
from lightning_ppdl.errors import ParticipantFailedError
from lightning_ppdl.models import cnn, linear, mlp
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.records import entries
from lightning_ppdl.simulation import Simulation, SimulationResults, simulate

ROUNDS, PARAMETERS, FRACTION = 10, 140_106, 0.1
PER_PARAMETER = [1.0, 10.0, 100.0]
RATES = [5.0, 20.0, 50.0]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--private", type=Path, required=True, help="from mnist_private.py --json")
    options.add_argument("--figure", type=Path, default=Path("mnist_private.png"))
    options.add_argument("--alone", type=int, default=15, help="participants that train alone")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    private: dict[str, list[float]] = json.loads(arguments.private.read_text())
    seed, alone = arguments.seed, arguments.alone

    on_features = features_alone(scattered_mnist(arguments.data_root), alone, seed)
    print(f"alone, linear model on the features: {on_features:.2%} on average of {alone}", flush=True)
    on_pixels = 0.0
    for name, model in [("MLP", mlp), ("CNN", cnn)]:
        reached = alone_on_average(
            simulate(
                paper_job(
                    arguments.data_root,
                    model=model,
                    participants=alone,
                    rounds=20,
                    baselines=("standalone",),
                    seed=seed,
                )
            )
        )
        on_pixels = max(on_pixels, reached)
        print(f"alone, the paper's {name} on pixels: {reached:.2%} on average of {alone}", flush=True)

    totals = {float(epsilon): float(epsilon) for epsilon in private}
    uploads = entries(FRACTION, PARAMETERS)
    paper = {f"total {total:g}": (total, total / uploads / ROUNDS) for total in totals}
    paper |= {f"{each:g} per parameter": (each * uploads * ROUNDS, each) for each in PER_PARAMETER}
    rows, points = [], {}
    for name, (total, each) in paper.items():
        points[name] = paper_mechanism(arguments.data_root, total / ROUNDS, seed)
        rows.append([name, f"{total:,.4g}", f"{each:.3g}", f"{points[name]:.2%}"])
        print(f"the paper's mechanism, {name}: {points[name]:.2%}", flush=True)
    print_table(["the paper's mechanism", "total epsilon", "per parameter", "accuracy"], rows)
    at_totals = {total: points[f"total {total:g}"] for total in totals}
    at_each = {each: points[f"{each:g} per parameter"] for each in PER_PARAMETER}
    draw(private, on_features, on_pixels, at_totals, at_each).savefig(arguments.figure, dpi=150)


def features_alone(splits: Splits, participants: int, seed: int) -> float:
    """Mean test accuracy of participants that train a linear model on their own 600 images' features."""

    def run(data: Splits, rate: float) -> float:
        optimizer = partial(torch.optim.SGD, lr=rate)
        model = partial(linear, bias=False)
        job = paper_job(
            None,
            data=Loaded(data),
            model=model,
            optimizer=optimizer,
            participants=participants,
            rounds=20,
            baselines=("standalone",),
            seed=seed,
        )
        return alone_on_average(simulate(job))

    public = measured_on_public_images(splits, seed)
    best = max(RATES, key=lambda rate: run(public, rate))
    print(f"learning rate {best:g}, of {RATES}, chosen on the images nobody holds", flush=True)
    return run(splits, best)


def paper_mechanism(data_root: str | None, epsilon: float, seed: int) -> float:
    """Final test accuracy under the paper's mechanism at ``epsilon`` a round; NaN where training diverged."""
    mechanism = SparseVector(epsilon=epsilon, fraction=FRACTION, variant="paper", truncate=0.001)
    job: Simulation = paper_job(data_root, participants=90, rounds=ROUNDS, privacy=mechanism, seed=seed)
    try:
        return simulate(job).rows[-1].accuracy
    except ParticipantFailedError as error:
        print(f"diverged: {error}")
        return math.nan


def alone_on_average(results: SimulationResults) -> float:
    """After the last round."""
    assert results.standalone is not None
    return mean(results.standalone.final)


def draw(
    private: Mapping[str, Sequence[float]],
    on_features: float,
    on_pixels: float,
    at_totals: Mapping[float, float],
    at_each: Mapping[float, float],
) -> Figure:
    """Two panels: total epsilon to the left, the paper's epsilon per parameter to the right."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    epsilons = [float(epsilon) for epsilon in private]
    means = [100 * mean(values) for values in private.values()]
    below = [m - 100 * min(values) for m, values in zip(means, private.values())]
    above = [100 * max(values) - m for m, values in zip(means, private.values())]
    left.errorbar(
        epsilons,
        means,
        yerr=[below, above],
        color="#0b6e4f",
        marker="o",
        linewidth=2.5,
        capsize=3,
        label="private collaboration (each image protected)",
    )
    left.plot(
        list(at_totals),
        [100 * value for value in at_totals.values()],
        color="#7a4fb5",
        marker="s",
        label="the paper's mechanism (each participant protected)",
    )
    right.plot(
        list(at_each),
        [100 * value for value in at_each.values()],
        color="#7a4fb5",
        marker="s",
        linestyle="--",
    )
    for axes in (left, right):
        axes.axhline(100 * on_features, color="#c1440e", label="alone, same features, no noise")
        axes.axhline(
            100 * on_pixels, color="#c1440e", linestyle=":", label="alone, the paper's network, no noise"
        )
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    left.minorticks_off()
    left.set_xlabel("total epsilon over the whole run")
    left.set_ylabel("test accuracy, %")
    left.set_title("90 participants with 600 images each", loc="left")
    left.legend(loc="center right", frameon=False, fontsize=8)
    right.set_xlabel("epsilon per parameter and round\n(x 140,100 is the total)")
    right.set_title("the paper's figure", loc="left")
    return figure


if __name__ == "__main__":
    main()
