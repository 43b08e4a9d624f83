"""Who may exchange with the server now, and what is merged when: the server's side of a protocol."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning_ppdl.records import SparseUpdate
from lightning_ppdl.server.merge import MergeContext


class Turns(ABC):
    """Turns of one server under one protocol. Not thread-safe: the server locks.

    A turn spans a participant's download, training and upload. It is a lease: whoever falls silent
    loses it, so nobody waits without a bound.

    Args:
        lease_seconds: How long a turn lasts without a sign of life.
    """

    anytime: ClassVar[bool] = False
    """Whether nobody waits for a turn: see :class:`~lightning_ppdl.records.Membership`."""

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds

    @abstractmethod
    def enter(self, name: str) -> None:
        """Let ``name`` take part; it may have been here before."""

    @abstractmethod
    def leave(self, name: str) -> None:
        """Expect ``name`` no more until it enters again."""

    @abstractmethod
    def take(self, name: str) -> bool:
        """Whether ``name`` may start its round now; if so it has the turn."""

    @abstractmethod
    def renew(self, name: str) -> None:
        """A sign of life.

        Raises:
            TurnNotHeldError: if ``name`` does not have the turn (any more).
        """

    @abstractmethod
    def end(self, name: str) -> None:
        """``name`` is done with its turn, if it has one."""

    collects: bool = False
    """Whether uploads are collected, to be merged together when they are :meth:`due`; else each is merged by
    itself, at once."""

    def collect(self, update: SparseUpdate, context: MergeContext) -> None:  # noqa: B027
        """Take an accepted upload by a holder of the turn, where uploads are collected.

        Raises:
            TurnNotHeldError: if the upload cannot be merged under this protocol any more.
        """

    def due(self) -> SparseUpdate | None:
        """What has been collected and is to be merged now, once. Called at the start of every request and
        after every change, so this is also where time is looked at."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts from which another process goes on: whose turn comes when.
        Copies: what happens later does not change them. Looked at after every request."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - not all protocols have turns
        """Go on from :meth:`state_dict`, with leases begun anew."""

    def resume(self) -> None:  # noqa: B027
        """Called once after a restart, when :meth:`load_state_dict` has been: whoever had the turn has it,
        and members that the server has been given since take their place."""

    @property
    def awaited(self) -> tuple[str, ...]:
        """Whom those who wait for a turn are waiting for."""
        return ()

    @property
    def expires_at(self) -> float:
        """When, on the server's clock, the mere passing of time next changes whose turn it is; inf for
        never."""
        return math.inf


class Anytime(Turns):
    """Everyone may exchange whenever it likes, and each upload is merged at once."""

    anytime = True

    def enter(self, name: str) -> None:
        pass

    def leave(self, name: str) -> None:
        pass

    def take(self, name: str) -> bool:
        return True

    def renew(self, name: str) -> None:
        pass

    def end(self, name: str) -> None:
        pass
