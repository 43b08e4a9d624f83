"""What the server accepts. Each refusal has its own error, and leaves the state untouched."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_ppdl.errors import (
    BoundExceededError,
    ConfigurationError,
    FractionExceededError,
    IndexOutOfRangeError,
    JoinRefusedError,
    LimitExceededError,
    MalformedUpdateError,
    MergeError,
    NonFiniteValueError,
    UnknownParticipantError,
    UnknownVersionError,
    UnsortedIndicesError,
)
from lightning_ppdl.records import Manifest, SparseUpdate, Vector, entries
from lightning_ppdl.server.merge import MergeRule
from lightning_ppdl.server.store import Change, Store
from lightning_ppdl.validation import require_count, require_fraction, require_name, require_positive


@dataclass(frozen=True)
class Terms:
    """Who may join, and what the server agrees to at most.

    Args:
        upload_fraction: theta_u in (0, 1].
        bound: gamma; None for any bound, and none.
        members: Names; None admits anyone.
        max_members: The most that may ever join; None for any number.
    """

    upload_fraction: float = 1.0
    bound: float | None = None
    members: Sequence[str] | None = None
    max_members: int | None = None

    def __post_init__(self) -> None:
        require_fraction("upload_fraction", self.upload_fraction)
        if self.bound is not None:
            require_positive("bound", self.bound)
        if self.max_members is not None:
            require_count("max_members", self.max_members)
        members = self.members
        if members is None:
            return
        if not isinstance(members, str):
            for name in members:
                require_name("members", name)
        if isinstance(members, str) or len(set(members)) != len(members) or not members:
            raise ConfigurationError(
                f"members={list(members)!r} must be a list that names each participant once"
            )

    def check_join(
        self, participant: str, manifest: Manifest, rule: MergeRule, known: Collection[str], server: str
    ) -> None:
        """Raise unless ``participant`` may join with what it declares.

        A fraction or bound that is NaN, which is neither above nor below anything, is refused.

        Args:
            participant: Its name.
            manifest: What it declares.
            rule: What will merge its updates.
            known: All that ever joined.
            server: The address it used, for error messages.

        Raises:
            UnknownParticipantError: if it is not among the members.
            JoinRefusedError: if it declares more than these terms, or what the rule cannot merge.
            LimitExceededError: if it is one more than may join.
        """
        require_name("participant", participant)
        if self.members is not None and participant not in self.members:
            raise UnknownParticipantError(
                f"participant={participant!r} is not among the members of {server!r}; ask its operator to "
                f"add it"
            )
        if self.max_members is not None and participant not in known and len(known) >= self.max_members:
            raise LimitExceededError(
                f"participant={participant!r} is one more than the {self.max_members} that {server!r} takes; "
                f"its operator can raise max_members"
            )
        if manifest.quantity not in rule.quantities:
            raise JoinRefusedError(
                f"quantity={manifest.quantity!r} cannot be merged by {type(rule).__name__}; serve "
                f"{server!r} with merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=...))"
            )
        if not 0 < manifest.upload_fraction <= self.upload_fraction:
            raise JoinRefusedError(
                f"upload fraction {manifest.upload_fraction:g} is not within what {server!r} agrees to, "
                f"0 to {self.upload_fraction:g}; lower selection.fraction"
            )
        limit = math.inf if self.bound is None else self.bound
        if manifest.bound is None:
            if self.bound is not None:
                raise JoinRefusedError(
                    f"{server!r} agrees to values of magnitude {self.bound:g} at most, and this participant "
                    f"promises no bound: give bound={self.bound:g}. Noise goes beyond the bound of what it "
                    f"is added to; a privacy mechanism has to truncate what it releases as well"
                )
        elif not 0 < manifest.bound <= limit:
            raise JoinRefusedError(
                f"bound={manifest.bound!r} is not within what {server!r} agrees to, 0 to {limit:g}; give "
                f"bound={1.0 if self.bound is None else self.bound:g}"
            )


def check_vector(vector: Vector, manifest: Manifest) -> Vector:
    """Return ``vector`` if it can be the first shared parameters: finite float32 (P,)."""
    expected = (manifest.size,)
    if vector.shape != expected or vector.dtype != np.float32 or not np.isfinite(vector).all():
        raise JoinRefusedError(
            f"initial parameters must be finite float32 of shape {expected}, not {vector.dtype} "
            f"{vector.shape}"
        )
    return vector


def check_update(update: SparseUpdate, manifest: Manifest, version: int) -> None:
    """Raise an :class:`~lightning_ppdl.errors.AdmissionError` unless ``update`` keeps to what was agreed.

    Args:
        update: What arrived.
        manifest: What its participant declared at join.
        version: The server's version now.
    """
    indices, values = update.indices, update.values
    who = f"update of participant {update.participant!r}, round {update.round}"
    if indices.shape != values.shape or indices.ndim != 1 or indices.dtype != np.int64:
        raise MalformedUpdateError(
            f"{who}: indices {indices.shape} {indices.dtype} and values {values.shape} do not pair up; "
            f"send int64 (k,) and float32 (k,)"
        )
    if values.dtype != np.float32:
        raise MalformedUpdateError(f"{who}: values have dtype {values.dtype}; send float32")
    if not 0 <= update.base_version <= version:
        raise UnknownVersionError(
            f"{who}: based on version {update.base_version}, but the server is at {version}; join again"
        )
    if not len(indices):
        return
    # Few passes: this is a good part of what an upload costs the server.
    increasing = bool((indices[1:] > indices[:-1]).all())
    lowest, highest = (indices[0], indices[-1]) if increasing else (indices.min(), indices.max())
    if lowest < 0 or highest >= manifest.size:
        worst = int(lowest if lowest < 0 else highest)
        raise IndexOutOfRangeError(f"{who}: index {worst} is outside the {manifest.size} shared parameters")
    if not increasing:
        at = int(np.argmax(indices[1:] <= indices[:-1]))
        raise UnsortedIndicesError(
            f"{who}: indices must strictly increase, but {indices[at]} is followed by {indices[at + 1]}"
        )
    largest = np.maximum(values.max(), -values.min())  # NaN if any value is
    if not np.isfinite(largest):
        at = int(np.argmin(np.isfinite(values)))
        raise NonFiniteValueError(f"{who}: value {values[at]} at index {indices[at]} is not finite")
    # Compared in float32, as the bound was applied in float32.
    if manifest.bound is not None and largest > np.float32(manifest.bound):
        raise BoundExceededError(
            f"{who}: a value of magnitude {largest:g} is beyond the agreed bound {manifest.bound:g}"
        )
    most = entries(manifest.upload_fraction, manifest.size)
    if len(indices) > most:
        raise FractionExceededError(
            f"{who}: {len(indices)} entries are more than the agreed fraction "
            f"{manifest.upload_fraction:g} of {manifest.size}, which is {most}"
        )


def check_change(change: Change, rule: object, store: Store) -> Change:
    """Return ``change`` if it can be added to the shared parameters.

    Raises:
        MergeError: naming the merge rule, if it is no Change, does not fit, or is not finite.
    """
    name = f"{type(rule).__name__}.merge()"
    if not isinstance(change, Change):
        raise MergeError(f"{name} must return a Change, not {type(change).__name__}")
    expected = store.parameters.shape if change.indices is None else change.indices.shape
    if change.values.shape != expected:
        raise MergeError(f"{name} returned values of shape {change.values.shape} for {expected} entries")
    if not np.isfinite(change.values).all():
        raise MergeError(f"{name} returned a value that is NaN or infinite; nothing was merged")
    return change
