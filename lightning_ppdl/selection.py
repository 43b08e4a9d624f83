"""Which entries of an update leave the participant (paper, section 5.2).

A selection looks at the update's values, so *which* indices are uploaded tells something about the
data too; see ``docs/`` on what sharing fewer values does and does not protect.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import entries
from lightning_ppdl.validation import require_fraction, require_not_negative

_SAMPLE = 8192


class Selection(ABC):
    """Chooses at most ``fraction`` of the entries of an update.

    To add one, subclass, keep a ``fraction`` and write :meth:`select`.
    """

    fraction: float
    looks_at_data: ClassVar[bool] = True
    """Whether the choice depends on the update. One that does not may come before noise is added."""

    @abstractmethod
    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        """Choose entries of an update.

        Args:
            delta: float32 (P,), finite, on the participant's device. Not to be changed.
            generator: CPU generator of this participant and round; draw from no other.

        Returns:
            int64 (k,) strictly increasing indices on ``delta``'s device, k <= ``count(P)``.
        """

    def count(self, size: int) -> int:
        """The most entries that may be chosen among ``size``: floor(theta_u * P), c in the paper.

        Raises:
            ConfigurationError: if that is none.
        """
        return require_entries(self.fraction, size)


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
            return _where(magnitude > 0)
        smallest = _kth_largest(magnitude, count)
        if smallest == 0:
            return _where(magnitude > 0)
        chosen = _where(magnitude >= smallest)
        if len(chosen) == count:
            return chosen
        above = _where(magnitude > smallest)
        ties = _where(magnitude == smallest)[: count - len(above)]
        return torch.cat([above, ties]).sort().values


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
        candidates = _where(delta.abs() > self.threshold)
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


def require_entries(fraction: float, size: int) -> int:
    """How many of ``size`` shared parameters ``fraction`` allows to leave, c in the paper.

    Raises:
        ConfigurationError: if that is none.
    """
    count = entries(fraction, size)
    if count == 0:
        raise ConfigurationError(
            f"fraction={fraction!r} of {size} shared parameters selects none; use at least "
            f"fraction={1 / max(size, 1):.2g}"
        )
    return count


def default_selection(fraction: float | None = None) -> Selection | None:
    """``LargestValues(fraction)``, or None, which leaves the choice to the strategy and its mechanism."""
    return None if fraction is None else LargestValues(fraction)


def _where(mask: Tensor) -> Tensor:
    """Indices of the true entries; on the CPU numpy finds them several times faster than torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


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
