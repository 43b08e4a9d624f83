"""Exchange protocols: who uses the server when (paper, section 5.3), and what is merged at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.randomness import numpy_generator
from lightning_ppdl.server.cohort import Cohort
from lightning_ppdl.server.merge import Add, MergeRule, Remainder
from lightning_ppdl.server.queue import Queue
from lightning_ppdl.server.turns import Anytime, Turns
from lightning_ppdl.validation import require_count, require_fraction, require_positive


class ExchangeProtocol(ABC):
    """Decides who may exchange with the server, and when. Keeps no state: its turns do."""

    @abstractmethod
    def make_turns(self, members: Sequence[str], lease_seconds: float, clock: Callable[[], float]) -> Turns:
        """The turns of one server.

        Args:
            members: Names known in advance, in the server's order; empty where anyone may join.
            lease_seconds: How long a turn lasts without a sign of life.
            clock: Seconds, monotonic.
        """

    def default_merge(self) -> MergeRule:
        """The merge rule of a server that names none: one that converges under this protocol."""
        return Add()


class TurnTaking(ExchangeProtocol):
    """One participant at a time downloads, trains and uploads; every member once a cycle."""

    @abstractmethod
    def order(self, members: Sequence[str], cycle: int) -> Sequence[str]:
        """The order of turns in a cycle, each member once.

        Args:
            members: All that take part, in the server's order.
            cycle: Counts from 0; every member has one turn a cycle.
        """

    def make_turns(self, members: Sequence[str], lease_seconds: float, clock: Callable[[], float]) -> Turns:
        return Queue(self.order, members, lease_seconds, clock)


@dataclass(frozen=True)
class RoundRobin(TurnTaking):
    """Turns in a fixed order: each downloads, trains and uploads before the next one starts."""

    def order(self, members: Sequence[str], cycle: int) -> Sequence[str]:
        return members


@dataclass(frozen=True)
class RandomOrder(TurnTaking):
    """Turns in an order drawn anew for every cycle.

    Args:
        seed: Of the orders; they need no secrecy.
    """

    seed: int = 0

    def order(self, members: Sequence[str], cycle: int) -> Sequence[str]:
        shuffled = numpy_generator(self.seed, "turns", cycle).permutation(len(members))
        return [members[i] for i in shuffled]


@dataclass(frozen=True)
class Asynchronous(ExchangeProtocol):
    """No turns: everyone downloads and uploads when ready, so updates are based on stale parameters."""

    def make_turns(self, members: Sequence[str], lease_seconds: float, clock: Callable[[], float]) -> Turns:
        return Anytime(lease_seconds)

    def default_merge(self) -> MergeRule:
        return Remainder()


@dataclass(frozen=True)
class Synchronous(ExchangeProtocol):
    """Cycles in which all train from the same version, and the mean of their updates is merged.

    With ``quantity="gradient"`` and :class:`~lightning_ppdl.ServerOptimizer` this is FedSGD, with
    ``quantity="change"`` and :class:`~lightning_ppdl.Add` FedAvg, every participant counting the same
    whatever the size of its data. The merge rule sees the mean as one update without staleness, and the
    version rises by one a cycle; so momentum, or an optimizer, at the server steps once a cycle.

    A cycle's cohort is everyone expected when its first member begins: all that have joined, and in the
    first cycle also those of the server's ``members`` that have not. Who joins later is in the next one.
    The cycle ends when each of the cohort has uploaded, given its turn back, left, or been silent for
    the server's ``lease_seconds``; or at the deadline. Uploads after that are refused with
    :class:`~lightning_ppdl.errors.LateUpdateError`, and their participant goes on with the next cycle.
    An upload is answered at once, with the version that the merge makes if it comes about.

    Args:
        quorum: The least that a merge needs: a number of uploads (int), or a fraction in (0, 1] of the
            cohort (float; who left in the middle is not counted). A cycle that ends with fewer merges
            nothing, and the next one starts from the same version. None: one upload is enough.
        deadline_seconds: Longest duration of a cycle, from its first download; None for no limit but the
            leases.
        min_members: The first cycle waits until so many have joined, so that the first to come does not
            train alone: at least a quorum that is a number, at most all of the server's ``members``. Not
            asked for later: who is left when the others are done may finish its rounds.

    Edge cases: a cycle nobody uploads in merges nothing. Where all uploads are empty the version rises
    and no parameter changes. An entry that only some upload is divided by the number of all uploads. A
    merge rule that fails, fails for whoever's request ended the cycle, and the cycle is lost.

    Raises:
        ConfigurationError: for a quorum that is neither, or that ``members`` are too few for.

    Source: H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data" (2017), algorithm 1, with equal weights.

    >>> Synchronous(quorum=0.8).required(4), Synchronous(quorum=3).required(10), Synchronous().required(9)
    (4, 3, 1)
    """

    quorum: float | None = None
    deadline_seconds: float | None = None
    min_members: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.quorum, Integral):
            require_count("quorum", self.quorum)
        elif self.quorum is not None:
            require_fraction("quorum", self.quorum)
        if self.deadline_seconds is not None:
            require_positive("deadline_seconds", self.deadline_seconds)
        require_count("min_members", self.min_members)

    def required(self, cohort: int) -> int:
        """How many uploads a merge needs where ``cohort`` participants were to upload."""
        if self.quorum is None:
            return 1
        if isinstance(self.quorum, Integral):
            return int(self.quorum)
        # The tolerance undoes binary rounding, as in :func:`~lightning_ppdl.records.entries`.
        return math.ceil(self.quorum * cohort - 1e-6)

    def make_turns(self, members: Sequence[str], lease_seconds: float, clock: Callable[[], float]) -> Turns:
        if members and self.required(len(members)) > len(members):
            raise ConfigurationError(
                f"quorum={self.quorum!r} cannot be reached by {len(members)} members; give at most that, or "
                f"a fraction"
            )
        least = max(self.min_members, self.required(1))
        return Cohort(
            members,
            lease_seconds,
            clock,
            required=self.required,
            deadline_seconds=math.inf if self.deadline_seconds is None else self.deadline_seconds,
            min_members=min(least, len(members) or least),
        )
