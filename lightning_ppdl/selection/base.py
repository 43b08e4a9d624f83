"""What a selection is, and what is asked of its indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError, SelectionError
from lightning_ppdl.records import ParameterSpec, entries


class Selection(ABC):
    """Chooses at most ``fraction`` of the entries of an update.

    To add one, subclass, keep a ``fraction`` and write :meth:`select`. It is configuration, and many
    participants may share one object: it keeps nothing from one round for the next.
    """

    fraction: float
    looks_at_data: bool = True
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

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> Selection:
        """This selection for one participant's shared tensors; called once, before its first round.

        Args:
            specs: The tensors, in the order in which they lie in the update, one after the other.

        Returns:
            Itself, unless the choice depends on them.

        Raises:
            ConfigurationError: if it cannot work with these tensors.
        """
        return self


def require_entries(fraction: float, size: int, name: str = "fraction") -> int:
    """How many of ``size`` shared parameters ``fraction`` allows to leave, c in the paper.

    Raises:
        ConfigurationError: if that is none.
    """
    count = entries(fraction, size)
    if count == 0:
        raise ConfigurationError(
            f"{name}={fraction!r} of {size} shared parameters selects none; use at least "
            f"{name}={1 / max(size, 1):.2g}"
        )
    return count


def require_selection(value: Selection) -> Selection:
    """Return ``value`` if it is a selection."""
    if not isinstance(value, Selection):
        raise ConfigurationError(f"selection={value!r} must be a Selection, e.g. LargestValues(fraction=0.1)")
    return value


def checked_indices(selection: Selection, delta: Tensor, generator: torch.Generator) -> Tensor:
    """What ``selection`` chooses of ``delta``, checked, for it may be anybody's.

    Raises:
        SelectionError: if that is not what :meth:`Selection.select` promises.
    """
    indices = selection.select(delta, generator)
    name = f"{type(selection).__name__}.select()"
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        got = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices)
        raise SelectionError(f"{name} must return an int64 tensor of shape (k,), not {got}")
    if len(indices) > selection.count(delta.numel()):
        raise SelectionError(
            f"{name} returned {len(indices)} indices; fraction={selection.fraction!r} of "
            f"{delta.numel()} entries allows {selection.count(delta.numel())}"
        )
    if len(indices) and not (
        int(indices[0]) >= 0 and int(indices[-1]) < delta.numel() and bool((indices.diff() > 0).all())
    ):
        raise SelectionError(
            f"{name} must return strictly increasing indices in [0, {delta.numel()}); sort them, and "
            f"return none twice"
        )
    return indices


def where(mask: Tensor) -> Tensor:
    """Indices of the true entries; on the CPU numpy finds them several times faster than torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)
