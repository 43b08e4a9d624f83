"""How the settings of mnist_private.py were chosen: on the 6,000 training images that nobody holds.

All participants' private steps at once, without Trainers, for several settings side by side: one product
for the logits, one for the clipped gradients, and one Gaussian in place of the sum of the participants'.
Noise is white in any basis, so the features are first projected on their principal axes, which
changes little and makes this fast. Prints the accuracy on those images, mean over seeds; each seed has
images and noise of its own. The test set is not looked at.
"""

from __future__ import annotations

import itertools
import math
from statistics import mean

import torch
from support import parser, print_table
from support.private_digits import (
    DELTA,
    PARTICIPANTS,
    RECORDS,
    Settings,
    scattered_mnist,
    shares_and_public_rows,
)
from torch import Tensor

from lightning_ppdl.privacy.mechanism import Plan
from lightning_ppdl.privacy.record.record_level import RecordLevel

AXES, CHUNK = 640, 2000


def on_principal_axes(features: Tensor) -> Tensor:
    """(n, d) to (n, AXES), on the axes of the first 12,000 rows' second moments."""
    some = features[:12_000]
    axes: Tensor = torch.linalg.eigh(some.T @ some).eigenvectors[:, -AXES:]
    return features @ axes


def noise_multiplier(epsilon: float, settings: Settings) -> float:
    """sigma of each participant's own noise."""
    mechanism = RecordLevel(epsilon=epsilon, delta=DELTA, sampling_rate=settings.sampling_rate)
    found = mechanism.calibrated(Plan(size=1, steps=settings.rounds)).noise_multiplier
    assert found is not None
    return found


def accuracies(
    features: Tensor, labels: Tensor, cases: list[tuple[float, Settings]], seed: int
) -> list[float]:
    """On the images nobody holds, of each case (epsilon, settings). Rounds and q are the first one's."""
    held, public = shares_and_public_rows(labels, seed)
    x, y = features[held], labels[held]
    lengths = x.norm(dim=1)[:, None, None]
    common = cases[0][1]
    rate, clip = (torch.tensor([getattr(s, name) for _, s in cases])[:, None] for name in ("rate", "clip"))
    epsilons = torch.tensor([epsilon for epsilon, _ in cases])[:, None]
    sigma = torch.tensor([noise_multiplier(*case) for case in cases])[:, None]
    draw, sample = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    weights = torch.zeros(x.shape[1], len(cases), 10)
    for _ in range(common.rounds):
        total = torch.zeros_like(weights).flatten(1)
        drawn = (torch.rand(len(x), generator=sample) < common.sampling_rate).nonzero()[:, 0]
        for rows in torch.split(drawn, CHUNK):
            batch = x[rows]
            residual = (batch @ weights.flatten(1)).view(len(rows), len(cases), 10).softmax(-1)
            residual[torch.arange(len(rows)), :, y[rows]] -= 1
            norms = residual.norm(dim=-1, keepdim=True) * lengths[rows]
            residual *= (clip / norms).clamp_max(1)
            total += batch.T @ residual.flatten(1)
        noise = torch.randn(x.shape[1], 1, 10, generator=draw) * sigma * clip * math.sqrt(PARTICIPANTS)
        mean_gradient = (total.view_as(weights) + noise) / (common.sampling_rate * RECORDS * PARTICIPANTS)
        weights -= rate * epsilons * mean_gradient
    logits = (features[public] @ weights.flatten(1)).view(len(public), len(cases), 10)
    right = logits.argmax(-1) == labels[public][:, None]
    return [float(value) for value in right.float().mean(0)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    options.add_argument("--rounds", type=int, nargs="+", default=[60, 100])
    options.add_argument("--sampling-rates", type=float, nargs="+", default=[0.2, 0.5])
    options.add_argument("--clips", type=float, nargs="+", default=[0.03, 0.1])
    options.add_argument("--rates", type=float, nargs="+", default=[250.0, 500.0, 750.0, 1000.0])
    arguments = options.parse_args()
    train = scattered_mnist(arguments.data_root).train
    features, labels = on_principal_axes(train.storage), train.labels
    rows = []
    for rounds, q in itertools.product(arguments.rounds, arguments.sampling_rates):
        grid = [Settings(rounds, q, *rest) for rest in itertools.product(arguments.clips, arguments.rates)]
        cases = [(epsilon, settings) for settings in grid for epsilon in arguments.epsilons]
        found = iter(zip(*(accuracies(features, labels, cases, seed) for seed in arguments.seeds)))
        for settings in grid:
            cells = [f"{mean(next(found)):.2%}" for _ in arguments.epsilons]
            rows.append([f"{rounds} rounds, q {q:g}, C {settings.clip:g}, rate {settings.rate:g}", *cells])
        print(f"done: {rounds} rounds, q {q:g}", flush=True)
    print(f"\naccuracy on the 6,000 images that nobody holds, mean over seeds {arguments.seeds}")
    print_table(["", *(f"epsilon {epsilon:g}" for epsilon in arguments.epsilons)], rows)


if __name__ == "__main__":
    main()
