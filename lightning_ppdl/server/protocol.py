"""Exchange protocols: in which order participants use the server (paper, section 5.3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ppdl.randomness import numpy_generator
from lightning_ppdl.server.merge import Add, MergeRule, Remainder


class ExchangeProtocol(ABC):
    """Decides who may exchange with the server, and in which order."""

    takes_turns: bool = True
    """Whether one participant at a time downloads, trains and uploads."""

    @abstractmethod
    def order(self, members: Sequence[str], cycle: int) -> Sequence[str]:
        """The order of turns in a cycle, each member once.

        Args:
            members: All that take part, in the server's order.
            cycle: Counts from 0; every member has one turn a cycle.
        """

    def default_merge(self) -> MergeRule:
        """The merge rule of a server that names none: one that converges under this protocol."""
        return Add()


@dataclass(frozen=True)
class RoundRobin(ExchangeProtocol):
    """Turns in a fixed order: each downloads, trains and uploads before the next one starts."""

    def order(self, members: Sequence[str], cycle: int) -> Sequence[str]:
        return members


@dataclass(frozen=True)
class RandomOrder(ExchangeProtocol):
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

    takes_turns = False

    def order(self, members: Sequence[str], cycle: int) -> Sequence[str]:
        return members

    def default_merge(self) -> MergeRule:
        return Remainder()
