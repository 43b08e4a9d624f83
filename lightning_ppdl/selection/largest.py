"""The entries of largest magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl.selection.base import Selection, where
from lightning_ppdl.validation import require_fraction

_SAMPLE = 8192


@dataclass(frozen=True)
class LargestValues(Selection):
    """The ``fraction`` of entries with the largest magnitude (the paper's "largest values").

    Args:
        fraction: theta_u, in (0, 1].

    Edge cases: entries that are exactly zero are never chosen, so a zero update selects nothing;
    among equal magnitudes the lowest indices are chosen; ``fraction=1`` takes every non-zero entry.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        require_fraction("fraction", self.fraction)

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        magnitude = delta.abs()
        count = self.count(delta.numel())
        if count == delta.numel():
            return where(magnitude > 0)
        smallest = _kth_largest(magnitude, count)
        if smallest == 0:
            return where(magnitude > 0)
        chosen = where(magnitude >= smallest)
        if len(chosen) == count:
            return chosen
        above = where(magnitude > smallest)
        ties = where(magnitude == smallest)[: count - len(above)]
        return torch.cat([above, ties]).sort().values


def _kth_largest(magnitude: Tensor, count: int) -> float:
    """The ``count``-th largest of ``magnitude``, (P,). See benchmarks/selection.py for the choices."""
    if magnitude.device.type != "cpu":
        return float(magnitude.topk(count, sorted=False).values.min())
    values = magnitude.numpy()
    # A regular sample tells roughly where the cut lies: what is clearly below need not be sorted.
    sample = values[:: max(1, len(values) // _SAMPLE)]
    expected = count * len(sample) // len(values)
    place = len(sample) - 1 - expected - 4 * math.isqrt(expected + 1)
    if place > 0:
        candidates = values[values >= np.partition(sample, place)[place]]
        if len(candidates) >= count:
            values = candidates
    return float(np.partition(values, len(values) - count)[len(values) - count])
