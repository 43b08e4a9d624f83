"""Uniform samples: of what exceeds a threshold, or of everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ppdl.selection.base import Selection, where
from lightning_ppdl.validation import require_fraction, require_not_negative


@dataclass(frozen=True)
class RandomAboveThreshold(Selection):
    """A uniform sample among the entries whose magnitude exceeds ``threshold``.

    Args:
        fraction: theta_u, in (0, 1]: at most this share of all P entries is chosen.
        threshold: tau, in the parameters' units, 0 or more.

    Edge cases: if no entry exceeds the threshold nothing is chosen; if fewer than the fraction do,
    all of them are; an entry equal to the threshold is not chosen.
    """

    fraction: float = 0.1
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        require_fraction("fraction", self.fraction)
        require_not_negative("threshold", self.threshold)

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        candidates = where(delta.abs() > self.threshold)
        count = self.count(delta.numel())
        if len(candidates) <= count:
            return candidates
        drawn = torch.randperm(len(candidates), generator=generator)[:count]
        return candidates[drawn.to(candidates.device)].sort().values


@dataclass(frozen=True)
class RandomFraction(Selection):
    """A uniform sample of all entries, drawn anew each round without looking at the update.

    Its indices tell nothing about the data, so under participant-level privacy noise goes to the sampled
    entries only.

    Args:
        fraction: theta_u, in (0, 1].

    Edge cases: entries that are zero are as likely as others; ``fraction=1`` takes every entry.
    """

    looks_at_data = False

    fraction: float = 0.1

    def __post_init__(self) -> None:
        require_fraction("fraction", self.fraction)

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        count = self.count(delta.numel())
        if count == delta.numel():
            return torch.arange(count, device=delta.device)
        drawn = torch.randperm(delta.numel(), generator=generator)[:count]
        return drawn.sort().values.to(delta.device)
