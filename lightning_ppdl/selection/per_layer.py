"""A quota for each tensor, so that none is crowded out by others whose changes are larger."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import ParameterSpec
from lightning_ppdl.selection.base import Selection, checked_indices, require_entries, require_selection
from lightning_ppdl.selection.error_feedback import ErrorFeedback
from lightning_ppdl.selection.largest import LargestValues
from lightning_ppdl.validation import require_fraction


@dataclass(frozen=True)
class PerLayer(Selection):
    """Another selection, applied to each shared tensor by itself.

    floor(theta_u * P) entries are apportioned to the tensors in proportion to their sizes, by largest
    remainders. Tensors that match a pattern of ``fractions`` are apart: they share that fraction of their
    own entries in the same way, and the other tensors theta_u of theirs. The sum of all quotas is the most
    that a round sends, and what the participant declares when it joins.

    Args:
        selection: What chooses within a tensor; its fraction is theta_u.
        fractions: Other fractions, in (0, 1], for tensors whose names match a pattern (:mod:`fnmatch` syntax,
            e.g. ``{"classifier.*": 0.5}``); of several patterns that match the first one counts.

    ====================  ========================================================================
    a share below 1       a small tensor may get no entry; give it a fraction of its own
    equal remainders      the tensors that come first get the entries
    a quota not used up   stays unused (zeros are never chosen by ``LargestValues``)
    zero update           as the inner selection has it, tensor by tensor
    fraction 1            every tensor may send all of its entries
    ====================  ========================================================================

    Raises:
        ConfigurationError: for a fraction out of range; once the tensors are known, for a pattern that
            matches none of them, and for a fraction that allows no entry of those that it is for.
    """

    selection: Selection = field(default_factory=LargestValues)
    fractions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(require_selection(self.selection), ErrorFeedback):
            raise ConfigurationError(
                f"selection={self.selection!r} within PerLayer: what is not sent is kept for all tensors "
                f"together; turn them round, ErrorFeedback(PerLayer(...))"
            )
        if isinstance(self.selection, PerLayer):
            raise ConfigurationError(
                f"selection={self.selection!r} within PerLayer: a tensor has one quota; give the selection "
                f"that is inside"
            )
        if not isinstance(self.fractions, Mapping | None):
            raise ConfigurationError(
                f"fractions={self.fractions!r} must map patterns of names to fractions, e.g. "
                f"fractions={{'classifier.*': 0.5}}"
            )
        for pattern, fraction in (self.fractions or {}).items():
            require_fraction(f"fractions[{pattern!r}]", fraction)

    @property
    def fraction(self) -> float:  # type: ignore[override]
        """theta_u: the inner selection's."""
        return self.selection.fraction

    @property
    def looks_at_data(self) -> bool:  # type: ignore[override]
        """As the inner selection: quotas follow from names and shapes."""
        return self.selection.looks_at_data

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        raise ConfigurationError(
            "PerLayer does not know the tensors: use what its for_tensors(layout.specs) returns"
        )

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> TensorByTensor:
        """The selection with its quotas settled."""
        parts = tuple(
            Part(spec.size, quota, _with_quota(self.selection, quota, spec.size))
            for spec, quota in zip(specs, self._quotas(specs))
        )
        return TensorByTensor(parts, self.looks_at_data)

    def _quotas(self, specs: Sequence[ParameterSpec]) -> list[int]:
        quotas = [0] * len(specs)
        for name, fraction, group in self._groups([spec.name for spec in specs]):
            sizes = [specs[place].size for place in group]
            shares = apportioned(require_entries(fraction, sum(sizes), name), sizes)
            for place, share in zip(group, shares):
                quotas[place] = share
        return quotas

    def _groups(self, names: Sequence[str]) -> list[tuple[str, float, list[int]]]:
        """Each fraction, what it is called, and the places of the tensors that it is for."""
        remaining = list(range(len(names)))
        groups = []
        for pattern, fraction in (self.fractions or {}).items():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigurationError(
                    f"fractions={self.fractions!r}: {pattern!r} matches none of {', '.join(names[:5])}"
                    f"{', ...' if len(names) > 5 else ''}"
                )
            matching = [place for place in remaining if fnmatchcase(names[place], pattern)]
            groups.append((f"fractions[{pattern!r}]", fraction, matching))
            remaining = [place for place in remaining if place not in matching]
        return [group for group in [*groups, ("fraction", self.fraction, remaining)] if group[2]]


@dataclass(frozen=True)
class Part:
    """One tensor of an update.

    Args:
        size: Its entries.
        quota: The most of them that are chosen.
        selection: What chooses them, with a fraction that makes that quota; None where it is 0.
    """

    size: int
    quota: int
    selection: Selection | None


@dataclass(frozen=True)
class TensorByTensor(Selection):
    """What :class:`PerLayer` becomes once the tensors are known.

    Args:
        parts: The tensors, in the order in which they lie in an update.
        looks_at_data: Whether a choice depends on the update.
    """

    parts: tuple[Part, ...]
    looks_at_data: bool

    @property
    def fraction(self) -> float:  # type: ignore[override]
        """All quotas together, of all entries."""
        return sum(part.quota for part in self.parts) / sum(part.size for part in self.parts)

    def count(self, size: int) -> int:
        expected = sum(part.size for part in self.parts)
        if size != expected:
            raise ConfigurationError(
                f"an update of {size} entries, and quotas for tensors with {expected}: call for_tensors() "
                f"with the tensors that are shared"
            )
        return sum(part.quota for part in self.parts)

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        self.count(delta.numel())
        chosen = []
        start = 0
        for part in self.parts:
            if part.selection is not None:
                values = delta[start : start + part.size]
                chosen.append(start + checked_indices(part.selection, values, generator))
            start += part.size
        return torch.cat(chosen)


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` in proportion to ``sizes``, in whole numbers: by largest remainders, the first ones first.

    >>> apportioned(10, [60, 25, 15])
    [6, 3, 1]

    Args:
        total: At most ``sum(sizes)``; no part then exceeds its size.
    """
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda place: -(total * sizes[place] % whole))
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts


def _with_quota(selection: Selection, quota: int, size: int) -> Selection | None:
    """``selection`` with the fraction that allows ``quota`` of ``size`` entries; None for none."""
    if not quota:
        return None
    made = copy.copy(selection)
    object.__setattr__(made, "fraction", quota / size)  # selections are frozen, and may be anybody's
    return made
