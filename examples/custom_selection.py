"""A selection of your own: which entries leave is drawn without looking at the update.

    python examples/custom_selection.py

``LargestValues`` and ``RandomAboveThreshold`` look at the values, so the indices they upload tell
something about the data. Here the indices follow from a seed alone; the values beside them are still
the participant's own, un-noised. The example prints what that choice costs in accuracy.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_ppdl import ConfigurationError, LargestValues, RoundRobin, Selection
from lightning_ppdl.data import Digits
from lightning_ppdl.models import mlp
from lightning_ppdl.partition import IID
from lightning_ppdl.simulation import Simulation, simulate


@dataclass(frozen=True)
class RandomEntries(Selection):
    """A uniform sample of all entries, whatever their values.

    Args:
        fraction: theta_u, in (0, 1].
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigurationError(f"fraction={self.fraction!r} must be in (0, 1]")

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        size = delta.numel()
        drawn = torch.randperm(size, generator=generator)[: self.count(size)]
        return drawn.sort().values.to(delta.device)


def accuracy(selection: Selection) -> float:
    """Test accuracy of five participants with 100 digits each, after ten rounds."""
    study = Simulation(
        data=Digits(),
        partition=IID(samples=100),
        model=mlp,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        participants=5,
        rounds=10,
        batch_size=5,
        selection=selection,
        protocol=RoundRobin(),
        baselines=(),
    )
    return simulate(study).rows[-1].accuracy


def main() -> None:
    for selection in (LargestValues(fraction=0.1), RandomEntries(fraction=0.1)):
        print(f"{selection}: accuracy {accuracy(selection):.1%}")


if __name__ == "__main__":
    main()
