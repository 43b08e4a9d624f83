"""An attacker's view of private steps: what a planted record gives away, against what is claimed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from auditing import Floats, epsilon_at_least
from torch import Tensor, nn

from lightning_ppdl.privacy.accounting import total
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.record.capture import Capture
from lightning_ppdl.privacy.record.clipping import ClippedSum, NoisyGradient
from lightning_ppdl.privacy.record.poisson import PoissonBatches

SIGMA, RATE, CLIP, DELTA, RUNS = 1.0, 0.5, 0.1, 1e-3, 2000
# Of no consequence itself, but for where it points.
CANARY = torch.tensor([[0.0, 50.0, 0.0]])
OTHERS = torch.cat([0.3 * torch.eye(3), -0.3 * torch.eye(3)])[torch.tensor([0, 2, 3, 5])]
CLAIMED = total([PrivateSteps(SIGMA, RATE, CLIP, steps=1)], DELTA).epsilon

Step = Callable[[Tensor, SeededNoise], Tensor]


class Model:
    """The real engine on a model of three weights; the gradient of a record is the record."""

    def __init__(self) -> None:
        self.layer = nn.Linear(3, 1, bias=False)
        self.capture = Capture(self.layer)
        self.parameters = list(self.capture.parameters.values())
        self.clipped = ClippedSum(self.parameters, CLIP)

    def step(self, batch: Tensor, noise: SeededNoise) -> Tensor:
        self.clip(batch)
        NoisyGradient(self.parameters, SIGMA * CLIP, 2.0, lambda: noise.gaussian(3)).write(self.clipped)
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad[0].clone()

    def clip(self, batch: Tensor) -> None:
        self.clipped.reset()
        self.capture.begin(len(batch))
        if len(batch):
            self.layer(batch).mean().backward()
        self.clipped.add(self.capture.end(), len(batch))

    def without_noise(self, batch: Tensor, noise: SeededNoise) -> Tensor:
        self.clip(batch)
        return self.clipped.total / 2

    def noise_before_the_clip(self, batch: Tensor, noise: SeededNoise) -> Tensor:
        noisy = batch.sum(0) + SIGMA * CLIP * torch.from_numpy(noise.gaussian(3)).float()
        return noisy * min(1.0, CLIP / float(noisy.norm()))

    def clipped_by_layer_uses(self, batch: Tensor, noise: SeededNoise) -> Tensor:
        """As if each of four uses of a layer were clipped by itself."""
        self.clip(batch)
        self.clipped.total.mul_(4)
        NoisyGradient(self.parameters, SIGMA * CLIP, 2.0, lambda: noise.gaussian(3)).write(self.clipped)
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad[0].clone()


def seen(step: Step, records: Tensor, seed: int) -> Floats:
    """The gradient's component along the canary, over many runs with fresh samples and noise."""
    noise = SeededNoise(seed, simulated=True)
    batches = PoissonBatches(len(records), RATE, noise.spawn("coins"))
    found: list[float] = []
    while len(found) < RUNS:
        for batch in batches:
            chosen = records[batch] if batches.sizes.popleft() else records[:0]
            found.append(float(step(chosen, noise)[1]))
    return np.array(found[:RUNS])


def lost(step: Step) -> float:
    return epsilon_at_least(seen(step, OTHERS, 1), seen(step, torch.cat([OTHERS, CANARY]), 2), DELTA)


def test_the_step_loses_no_more_than_it_claims() -> None:
    assert lost(Model().step) <= CLAIMED


@pytest.mark.parametrize("broken", ["without_noise", "noise_before_the_clip", "clipped_by_layer_uses"])
def test_broken_steps_are_caught(broken: str) -> None:
    assert lost(getattr(Model(), broken)) > CLAIMED
