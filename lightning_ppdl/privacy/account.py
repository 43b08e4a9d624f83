"""A participant's account: what its releases cost, and whether its budget has room for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning_ppdl.errors import BudgetExhaustedError, ConfigurationError, TaintedStateError
from lightning_ppdl.privacy.accounting import Spent, affordable, total
from lightning_ppdl.privacy.events import PrivacyEvent
from lightning_ppdl.privacy.ledger import Ledger, LedgerEntry
from lightning_ppdl.privacy.mechanism import Mechanism

_in_use: WeakKeyDictionary[Ledger, Account] = WeakKeyDictionary()


class Account:
    """Pays for the private releases of one participant out of a data set's ledger.

    Args:
        ledger: Of the data set. A path is opened, and closed by :meth:`close`.
        participant: The name in the ledger.
        mechanism: Its delta and its budget.
        event: What one release costs, or one private step.
        planned: How many of them the run plans, None if that is open.

    Raises:
        ConfigurationError: if another account pays out of this ledger: neither would know what the other is
            about to spend.
    """

    def __init__(
        self,
        ledger: Ledger | str | Path,
        participant: str,
        mechanism: Mechanism,
        event: PrivacyEvent,
        planned: int | None = None,
    ) -> None:
        self.participant = participant
        self._owns = not isinstance(ledger, Ledger)
        self._ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        if _in_use.setdefault(self._ledger, self) is not self:
            raise ConfigurationError(
                f"the ledger {self._ledger.path or 'in memory'} is in use by participant "
                f"{_in_use[self._ledger].participant!r}; a data set has one participant at a time"
            )
        self.mechanism = mechanism
        self._event = event
        self._planned = planned
        self._left = 0
        self._revision = -1
        self._study = ""
        self._unsettled: LedgerEntry | None = None

    def close(self) -> None:
        """Let another account have the ledger, and close it if this one opened it."""
        _in_use.pop(self._ledger, None)
        if self._owns:
            self._ledger.close()

    def resume(self, study: str, last_round: int) -> int:
        """Begin or go on at a server.

        Args:
            study: The collaboration's identity.
            last_round: The last round of it that the server accepted.

        Returns:
            The last round that this ledger paid for.

        Raises:
            LedgerBehindError: if the server has seen a release that the ledger does not know.
        """
        self._ledger.require_not_behind(study, self.participant, last_round)
        self._study = study
        return self._ledger.last_round(study, self.participant)

    def affords(self, count: int) -> bool:
        """Whether ``count`` more releases, or private steps, stay within the budget."""
        budget = self.mechanism.max_epsilon
        if budget is None:
            return True
        if count > self._left or self._ledger.revision != self._revision:
            # Settings are fixed in advance, so the number that fits is too: it is found once, not a release,
            # unless somebody else pays out of this ledger.
            # Where no end is planned the horizon doubles, so that this is not repeated at every step.
            most = max(2 * count, self._planned or 0)
            self._revision = self._ledger.revision
            mechanism = self.mechanism
            self._left = affordable(
                self._ledger.events(), self._event, budget, mechanism.delta, most, unit=mechanism.unit
            )
        return count <= self._left

    def pay(
        self, round: int, event: PrivacyEvent | None, released_values: int, message: bytes | None
    ) -> None:
        """Enter a release durably, with the bytes that are to be sent.

        Args:
            round: The participant's round.
            event: What was spent; None where the release is free, since what it follows from was paid for.
            released_values: Entries in it.
            message: The encoded release; None for a spend without one.

        Raises:
            LedgerWriteError: if that cannot be done; then nothing may be sent.
            BudgetExhaustedError: if the release does not fit into the budget; nothing is entered then.
        """
        units = 0 if event is None else getattr(event, "steps", 1)
        # What is not released stays in the house, and is entered whatever the budget says.
        if message is not None and units and not self.affords(units):
            raise BudgetExhaustedError(
                f"max_epsilon={self.mechanism.max_epsilon!r} has no room for this release: the ledger holds "
                f"{self.spent()}; nothing was sent"
            )
        entry = LedgerEntry.new(self._study, self.participant, round, event, released_values)
        self._ledger.record(entry, message)
        self._unsettled = None if message is None else entry
        self._left -= units
        self._revision += 1

    def unsent(self) -> bytes | None:
        """What was paid for before a restart and may not have been sent."""
        pending = self._ledger.pending(self._study, self.participant)
        if pending is None:
            return None
        self._unsettled = pending.entry
        return pending.message

    def settled(self) -> None:
        """The last release was answered, or given up: its bytes are needed no more."""
        if self._unsettled is not None:
            self._ledger.sent(self._unsettled.id)
            self._unsettled = None

    def spent(self) -> Spent:
        """The ledger's total at the mechanism's delta.

        Raises:
            ConfigurationError: if there is none for the mechanism's unit: no participant is protected by what
                was released at the level of records.
        """
        return total(self._ledger.events(), self.mechanism.delta, unit=self.mechanism.unit)

    def taint(self, reason: str) -> None:
        """Mark what this participant trains from now on as unfit for record-level releases, for good."""
        self._ledger.taint(self.participant, reason)

    def require_untainted(self) -> None:
        """Raise TaintedStateError if this participant was trained on without noise."""
        reason = self._ledger.tainted(self.participant)
        if reason is not None:
            raise TaintedStateError(
                f"participant {self.participant!r} was trained on without noise ({reason}): nothing that "
                f"follows from its parameters and its optimizer's state may be released at the level of "
                f"records. Begin anew with a new module and without its checkpoints, and then say so with "
                f"Ledger({str(self._ledger.path)!r}).clear_taint({self.participant!r})"
            )

    def to_primitives(self) -> list[dict[str, Any]]:
        """All entries of the ledger, for a checkpoint."""
        return self._ledger.to_primitives()

    def merge_primitives(self, entries: list[dict[str, Any]]) -> None:
        """Take in a checkpoint's entries: the union, so that an older one takes nothing back."""
        self._ledger.merge_primitives(entries)

    def metrics(self) -> dict[str, float]:
        """``epsilon`` spent, and ``epsilon_remaining`` where there is a budget."""
        epsilon = self.spent().epsilon
        budget = self.mechanism.max_epsilon
        return {
            "epsilon": epsilon,
            **({} if budget is None else {"epsilon_remaining": max(0.0, budget - epsilon)}),
        }
