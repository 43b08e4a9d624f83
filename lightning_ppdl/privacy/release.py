"""The one door: a local update goes in, what may leave the machine comes out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_ppdl.errors import NonFiniteUpdateError
from lightning_ppdl.privacy.events import PrivacyEvent
from lightning_ppdl.privacy.residual import Residual
from lightning_ppdl.records import ParameterSpec
from lightning_ppdl.selection import ErrorFeedback, Selection
from lightning_ppdl.selection.base import checked_indices, require_selection
from lightning_ppdl.validation import require_positive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Released:
    """What a release lets out, and what it did to it.

    Args:
        indices: int64 (k,), strictly increasing.
        values: float32 (k,).
        clamped_fraction: Share of the released values that the bound changed, 0 where none was. Under
            a privacy mechanism only what happened after the noise counts, so it tells nothing more.
        event: What the release costs; None where it carries no guarantee of its own.
    """

    indices: Tensor
    values: Tensor
    clamped_fraction: float
    event: PrivacyEvent | None = None


class Release(ABC):
    """Turns the update of a round into what is uploaded."""

    bound: float | None
    """gamma: every released value lies in [-bound, bound]; None for no bound."""

    @property
    def residual(self) -> Residual | None:
        """What was not released and is kept for later rounds; None where nothing is kept."""
        return None

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> Release:
        """This release for one participant's shared tensors; called once, before its first round.

        Args:
            specs: The tensors, in the order in which they lie in the update.

        Returns:
            Itself, unless its selection depends on them.

        Raises:
            ConfigurationError: if the selection cannot work with these tensors.
        """
        return self

    @abstractmethod
    def release(self, delta: Tensor, generator: torch.Generator) -> Released:
        """Release one round's update.

        Args:
            delta: float32 (P,).
            generator: CPU generator of this participant and round.

        Raises:
            NonFiniteUpdateError: if ``delta`` holds NaN or infinity.
        """

    @property
    def unrecorded(self) -> int:
        """Private steps taken and not yet part of an event; 0 for releases that cost a round each."""
        return 0

    def unpaid(self) -> PrivacyEvent | None:
        """What was spent and is in no ledger yet; None for releases that cost a round each."""
        return None

    def paid(self) -> None:  # noqa: B027 - releases that cost a round each keep no count
        """Say that what :meth:`unpaid` gave, or the last release's event, is in the ledger."""

    @abstractmethod
    def max_fraction(self, size: int) -> float:
        """The most that is ever released of ``size`` entries, as a fraction; checked before training.

        Raises:
            ConfigurationError: if nothing could ever be released.
        """


@dataclass(frozen=True)
class PlainRelease(Release):
    """Selection, then the bound; no noise, so it carries no privacy guarantee and claims none.

    One belongs to one participant: under :class:`~lightning_ppdl.selection.ErrorFeedback` it keeps the
    residual.

    Args:
        selection: Which entries leave.
        bound: gamma. Values are clamped into [-bound, bound]; None leaves them as they are.

    Edge cases: a zero update releases nothing; a value equal to the bound is not counted as clamped.
    """

    selection: Selection
    bound: float | None = None
    _residual: Residual | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        selection = require_selection(self.selection)
        if isinstance(selection, ErrorFeedback):
            object.__setattr__(self, "_residual", Residual(selection.ahead))
        if self.bound is not None:
            require_positive("bound", self.bound)

    @property
    def residual(self) -> Residual | None:
        return self._residual

    def for_tensors(self, specs: Sequence[ParameterSpec]) -> PlainRelease:
        return replace(self, selection=self.selection.for_tensors(specs))

    def release(self, delta: Tensor, generator: torch.Generator) -> Released:
        if self._residual is not None:
            delta = self._residual.added_to(delta)
        require_finite(delta)
        indices = self.choose(delta, generator)
        return clamped(indices, delta[indices], self.bound)

    def choose(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        """The selection's indices, checked: it may be anybody's, and no more than was agreed leaves by
        this door.

        Raises:
            SelectionError: if they are not what :meth:`Selection.select` promises.
        """
        return checked_indices(self.selection, delta, generator)

    def max_fraction(self, size: int) -> float:
        return self.selection.count(size) / size


def clamped(
    indices: Tensor, values: Tensor, bound: float | None, event: PrivacyEvent | None = None
) -> Released:
    """``values`` clamped into [-bound, bound], where there is a bound, ready to leave."""
    if bound is None or not len(values):
        return Released(indices, values, clamped_fraction=0.0, event=event)
    bounded = values.clamp(-bound, bound)
    return Released(indices, bounded, float((bounded != values).float().mean()), event)


def finite_or_zero(delta: Tensor) -> Tensor:
    """``delta``, or zeros if an entry of it is NaN or infinite.

    A mechanism must not fall silent for what is in the data: others would see that, at no cost in epsilon.
    """
    try:
        require_finite(delta)
    except NonFiniteUpdateError as error:
        log.warning("%s; noise alone is released in its place", error)
        return torch.zeros_like(delta)
    return delta


def require_finite(delta: Tensor) -> None:
    """Raise NonFiniteUpdateError where an entry of ``delta`` is NaN or infinite."""
    # One pass: a sum is finite only if its terms are. Sums of finite terms may overflow, so the
    # exact test decides.
    if torch.isfinite(delta.sum()) or torch.isfinite(delta).all():
        return
    bad = int((~torch.isfinite(delta)).sum())
    raise NonFiniteUpdateError(
        f"{bad} of {delta.numel()} entries of the local update are NaN or infinite: local training "
        f"diverged, nothing of it was uploaded. Lower the learning rate or clip gradients "
        f"(Trainer(gradient_clip_val=...))"
    )
