"""Who may exchange with the server now, and what is merged when: the server's side of a protocol."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from lightning_ppdl.records import SparseUpdate
from lightning_ppdl.server.merge import MergeContext


class Turns(ABC):
    """Turns of one server under one protocol. Not thread-safe: the server locks.

    A turn spans a participant's download, training and upload. It is a lease: whoever falls silent
    loses it, so nobody waits without a bound.

    Args:
        lease_seconds: How long a turn lasts without a sign of life.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._due: SparseUpdate | None = None

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

    def collect(self, update: SparseUpdate, context: MergeContext) -> None:
        """Take an accepted upload by a holder of the turn. Here: it is due at once, as it is.

        Raises:
            TurnNotHeldError: if the upload cannot be merged under this protocol any more.
        """
        self._due = update

    def due(self) -> SparseUpdate | None:
        """What is to be merged now, once. Called at the start of every request and after every change,
        so this is also where time is looked at."""
        due, self._due = self._due, None
        return due

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
