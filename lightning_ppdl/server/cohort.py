"""All at once: a cycle's participants train from the same version, and the mean of what they upload is
merged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning_ppdl.errors import LateUpdateError, TurnNotHeldError
from lightning_ppdl.records import SparseUpdate
from lightning_ppdl.server.mean import Mean
from lightning_ppdl.server.merge import MergeContext
from lightning_ppdl.server.turns import Turns

log = logging.getLogger(__name__)

_LEFT = "left"
_ENDED = "ended its round without an upload"


class Cohort(Turns):
    """Turns of one cycle after another.

    A cycle begins when somebody takes a turn while none is open; everyone expected then is its cohort.
    Each of them has one turn in it, and all turns overlap. It is closed when nobody of the cohort is
    awaited any more, or at the deadline; whoever comes in the meantime has its turn in the next one.

    Args:
        members: Names that are expected from the start; others are once they enter.
        lease_seconds: Who is silent for so long is not awaited, and not expected until it comes back.
        clock: Seconds, monotonic.
        required: How many uploads a merge needs, given how many were to upload.
        deadline_seconds: Longest duration of a cycle; inf for no limit.
        min_members: The first cycle does not begin before so many have entered; nor does the first one
            after everybody left.
    """

    collects = True

    def __init__(
        self,
        members: Sequence[str],
        lease_seconds: float,
        clock: Callable[[], float],
        required: Callable[[int], int],
        deadline_seconds: float,
        min_members: int,
    ) -> None:
        super().__init__(lease_seconds)
        self._members = tuple(members)
        self._clock = clock
        self._required = required
        self._deadline_seconds = deadline_seconds
        self._min_members = min_members
        self._here: set[str] = set()
        self._expected = dict.fromkeys(members)
        self._begun = False
        self._cycle = 0
        self._open = False
        self._deadline = math.inf
        # Who is awaited, and when its lease runs out: the first entry is always the first to do so.
        self._leases: dict[str, float] = {}
        self._holders: set[str] = set()
        self._missing: dict[str, str] = {}
        # Who missed the last deadline without a sign of life since: the lease goes on into the next
        # cycle, else one that died would be awaited until the deadline in every cycle.
        self._overdue: dict[str, float] = {}
        self._late: set[str] = set()
        self._mean: Mean | None = None
        self._due: SparseUpdate | None = None

    @property
    def awaited(self) -> tuple[str, ...]:
        if self._open:
            return tuple(self._leases)
        return () if self._begun else tuple(name for name in self._members if name not in self._here)

    @property
    def expires_at(self) -> float:
        if not self._open:
            return math.inf
        return math.nextafter(min(self._deadline, next(iter(self._leases.values()))), math.inf)

    def enter(self, name: str) -> None:
        self._here.add(name)
        self._expected[name] = None
        self._overdue.pop(name, None)

    def leave(self, name: str) -> None:
        for holding in (self._expected, self._overdue):
            holding.pop(name, None)
        self._here.discard(name)
        self._late.discard(name)
        if name in self._leases:
            self._drop(name, _LEFT)
        if not self._here:
            self._close_without(self._leases, "never came")
            self._begun = False
            self._expected = dict.fromkeys(self._members)

    def take(self, name: str) -> bool:
        self.enter(name)
        if not self._open and (self._begun or len(self._here) >= self._min_members):
            self._begin()
        if name not in self._leases:
            return False
        self._late.discard(name)
        self._holders.add(name)
        self._prolong(name)
        return True

    def renew(self, name: str) -> None:
        self._overdue.pop(name, None)
        if name in self._leases:
            self._prolong(name)
        if name in self._holders:
            return
        if name in self._late:
            raise LateUpdateError(
                f"participant {name!r} is too late: its cycle was closed without it, because its lease of "
                f"{self.lease_seconds:g} seconds ran out or the cycle's deadline passed. Take the turn "
                f"for the next cycle, and raise lease_seconds or deadline_seconds if rounds take longer"
            )
        raise TurnNotHeldError(
            f"participant {name!r} does not have the turn: it did not take it in this cycle, or is done "
            f"with it. Take the turn"
        )

    def end(self, name: str) -> None:
        if name in self._leases:
            self._drop(name, _ENDED)

    def collect(self, update: SparseUpdate, context: MergeContext) -> None:
        if context.staleness:
            raise LateUpdateError(
                f"update of participant {update.participant!r}, round {update.round}: it is based on "
                f"version {update.base_version}, and this cycle merges updates of version "
                f"{update.base_version + context.staleness}; download that, and train from there"
            )
        if self._mean is None:
            self._mean = Mean(len(context.parameters))
        self._mean.add(update)
        self._drop(update.participant)

    def due(self) -> SparseUpdate | None:
        now = self._clock()
        while self._leases and now > (first := next(iter(self._leases.items())))[1]:
            silent = first[0]
            self._expected.pop(silent, None)
            if silent in self._holders:
                self._late.add(silent)
            self._drop(silent, f"gave no sign of life for {self.lease_seconds:g} seconds")
        if self._open and now > self._deadline:
            self._overdue = dict(self._leases)
            self._close_without(self._leases, f"not within {self._deadline_seconds:g} seconds")
        due, self._due = self._due, None
        return due

    def state_dict(self) -> dict[str, Any]:
        return {
            "members": [*self._members],
            "here": sorted(self._here),
            "expected": [*self._expected],
            "begun": self._begun,
            "cycle": self._cycle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on between two cycles: what an open one had collected is not merged."""
        given_since = [name for name in self._members if name not in state["members"]]
        self._expected = dict.fromkeys([*state["expected"], *given_since])
        self._here = set(state["here"])
        self._begun, self._cycle = state["begun"], state["cycle"]

    def _begin(self) -> None:
        now = self._clock()
        self._open = self._begun = True
        self._cycle += 1
        self._deadline = now + self._deadline_seconds
        overdue = {name: until for name, until in self._overdue.items() if name in self._expected}
        self._overdue = {}
        fresh = (name for name in self._expected if name not in overdue)
        self._leases = {**overdue, **dict.fromkeys(fresh, now + self.lease_seconds)}

    def _prolong(self, name: str) -> None:
        del self._leases[name]
        self._leases[name] = self._clock() + self.lease_seconds

    def _drop(self, name: str, why: str | None = None) -> None:
        """Await ``name`` no more; ``why`` if it did not upload."""
        del self._leases[name]
        self._holders.discard(name)
        if why is not None:
            self._missing[name] = why
        if not self._leases:
            self._close()

    def _close_without(self, names: Iterable[str], why: str) -> None:
        if self._open:
            self._missing.update(dict.fromkeys(names, why))
            self._close()

    def _close(self) -> None:
        self._open = False
        self._late |= self._holders
        self._holders.clear()
        self._leases.clear()
        missing, self._missing = self._missing, {}
        count = 0 if self._mean is None else self._mean.count
        reasons = list(missing.values())
        required = self._required(count + len(reasons) - reasons.count(_LEFT))
        without = ", ".join(f"{name!r} ({why})" for name, why in missing.items()) or "anybody missing"
        if self._mean is not None and count >= max(1, required):
            self._due = self._mean.take(self._cycle)
            level = logging.INFO if {_LEFT, _ENDED}.issuperset(reasons) else logging.WARNING
            log.log(
                level,
                "cycle %d: mean of %d updates, without %s",
                self._cycle,
                count,
                without,
                extra={"event": "cycle_merged", "cycle": self._cycle, "updates": count, "missing": missing},
            )
            return
        if self._mean is not None:
            self._mean.clear()
        level = logging.INFO if {_LEFT}.issuperset(reasons) else logging.WARNING
        log.log(
            level,
            "cycle %d: nothing is merged, for %d updates are fewer than %d; without %s",
            self._cycle,
            count,
            max(1, required),
            without,
            extra={"event": "cycle_failed", "cycle": self._cycle, "updates": count, "missing": missing},
        )
