"""One participant at a time, in an order that the protocol gives."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lightning_ppdl.errors import TurnNotHeldError
from lightning_ppdl.server.turns import Turns

log = logging.getLogger(__name__)


class Queue(Turns):
    """The queue of turns. Each upload is merged at once.

    Args:
        order: Orders the members of a cycle, given them and the cycle's number from 0.
        members: Names known in advance, present or not yet; others enter when they join.
        lease_seconds: How long a turn lasts without a sign of life.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        order: Callable[[Sequence[str], int], Sequence[str]],
        members: Sequence[str],
        lease_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(lease_seconds)
        self._order = order
        self._clock = clock
        # In the order of turns, for good: whoever leaves or falls silent keeps its place for a return.
        self._roster = list(members)
        self._given = tuple(members)
        self._away: set[str] = set()
        self._queue: deque[str] = deque()
        self._served: set[str] = set()
        self._cycle = 0
        self._expires = 0.0
        self.current: str | None = None
        """Who has the turn, or is offered it."""
        self.held = False
        """Whether the current one took it."""

    @property
    def awaited(self) -> tuple[str, ...]:
        return () if self.current is None else (self.current,)

    @property
    def expires_at(self) -> float:
        return math.inf if self.current is None else math.nextafter(self._expires, math.inf)

    def enter(self, name: str) -> None:
        """Let ``name`` take part. Who comes in the middle of a cycle, and had no turn in it, is last.

        Who has the turn, and enters again, has to take it again: it may be another process than before.
        """
        if name == self.current:
            self.held = False
        self._expect(name)

    def _expect(self, name: str) -> None:
        if name in self._roster and name not in self._away:
            return
        self._away.discard(name)
        if name not in self._roster:
            self._roster.append(name)
        if self.current is None:
            self._queue.clear()  # nobody was left to go on: the next turn begins a cycle with all present
        elif name not in self._queue and name not in self._served:
            self._queue.append(name)

    def leave(self, name: str) -> None:
        self._away.add(name)
        if name in self._queue:
            self._queue.remove(name)
        if name == self.current:
            self._pass_on()

    def take(self, name: str) -> bool:
        self._expire()
        self._expect(name)
        if self.current is None:
            self._pass_on()
        if self.current != name:
            return False
        self.held = True
        self._expires = self._clock() + self.lease_seconds
        return True

    def renew(self, name: str) -> None:
        self._expire()
        if self.current != name or not self.held:
            raise TurnNotHeldError(
                f"participant {name!r} does not have the turn ({self.current!r} has it): its lease ran "
                f"out, or it never took it. Take the turn, and raise lease_seconds if a step takes "
                f"longer than the lease"
            )
        self._expires = self._clock() + self.lease_seconds

    def end(self, name: str) -> None:
        if self.current == name:
            self._served.add(name)
            self._pass_on()

    def state_dict(self) -> dict[str, Any]:
        return {
            "roster": [*self._roster],
            "away": sorted(self._away),
            "queue": [*self._queue],
            "served": sorted(self._served),
            "cycle": self._cycle,
            "current": self.current,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._roster = [*state["roster"]]
        self._away, self._served = set(state["away"]), set(state["served"])
        self._queue, self._cycle = deque(state["queue"]), state["cycle"]
        self.current = state["current"]
        self._expires = self._clock() + self.lease_seconds

    def resume(self) -> None:
        # Whoever has the turn may be at work on its round, and what it is about to upload must not be lost.
        self.held = True
        # At the end, and from the next cycle on: the order of the present one is being kept to.
        self._roster += [name for name in self._given if name not in self._roster]

    def _expire(self) -> None:
        """Take the turn from whoever was silent for longer than the lease."""
        while self.current is not None and self._clock() > self._expires:
            log.warning(
                "participant %r %s for %g seconds and lost its turn",
                self.current,
                "gave no sign of life" if self.held else "did not take its turn",
                self.lease_seconds,
                extra={
                    "event": "turn_lost",
                    "participant": self.current,
                    "seconds": self.lease_seconds,
                    "held": self.held,
                },
            )
            self._away.add(self.current)
            self._pass_on()

    def _pass_on(self) -> None:
        self.held = False
        self.current = self._next()
        self._expires = self._clock() + self.lease_seconds

    def _next(self) -> str | None:
        present = [name for name in self._roster if name not in self._away]
        if not present:
            return None
        self._queue = deque(name for name in self._queue if name not in self._away)
        if not self._queue:
            self._queue.extend(self._order(present, self._cycle))
            self._cycle += 1
            self._served.clear()
        return self._queue.popleft()
