"""A participant's account: what its releases cost, and whether its budget has room for another."""

from __future__ import annotations

from typing import Any

from lightning_ppdl.errors import TaintedStateError
from lightning_ppdl.privacy.accounting import Spent, affordable, total
from lightning_ppdl.privacy.events import PrivacyEvent
from lightning_ppdl.privacy.ledger import Ledger, LedgerEntry
from lightning_ppdl.privacy.mechanism import Mechanism


class Account:
    """Pays for the private releases of one participant out of a data set's ledger.

    Args:
        ledger: Of the data set; open.
        participant: The name in the ledger.
        mechanism: Its delta and its budget.
        event: What one release costs, or one private step.
        planned: How many of them the run plans, None if that is open.
    """

    def __init__(
        self,
        ledger: Ledger,
        participant: str,
        mechanism: Mechanism,
        event: PrivacyEvent,
        planned: int | None = None,
    ) -> None:
        self._ledger = ledger
        self._mechanism = mechanism
        self._event = event
        self._planned = planned or 1
        self._left = 0
        self._participant = participant
        self._study = ""
        self._unsettled: LedgerEntry | None = None

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
        self._ledger.require_not_behind(study, self._participant, last_round)
        self._study = study
        return self._ledger.last_round(study, self._participant)

    def affords(self, count: int) -> bool:
        """Whether ``count`` more releases, or private steps, stay within the budget."""
        budget = self._mechanism.max_epsilon
        if budget is None:
            return True
        if count > self._left:
            # Settings are fixed in advance, so the number that fits is too: it is found once, not a release.
            most = max(count, self._planned)
            self._left = affordable(self._ledger.events(), self._event, budget, self._mechanism.delta, most)
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
        """
        entry = LedgerEntry.new(self._study, self._participant, round, event, released_values)
        self._ledger.record(entry, message)
        self._unsettled = None if message is None else entry
        self._left -= getattr(event, "steps", 1)

    def unsent(self) -> bytes | None:
        """What was paid for before a restart and may not have been sent."""
        pending = self._ledger.pending(self._study, self._participant)
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
        """The ledger's total at the mechanism's delta."""
        return total(self._ledger.events(), self._mechanism.delta)

    def taint(self, reason: str) -> None:
        """Mark what this participant trains from now on as unfit for record-level releases, for good."""
        self._ledger.taint(self._participant, reason)

    def require_untainted(self) -> None:
        """Raise TaintedStateError if this participant was trained on without noise."""
        reason = self._ledger.tainted(self._participant)
        if reason is not None and self._mechanism.unit == "record":
            raise TaintedStateError(
                f"participant {self._participant!r} was trained on without noise ({reason}): nothing that "
                f"follows from its parameters and its optimizer's state may be released at the level of "
                f"records. Begin anew with a new module and without its checkpoints, and then say so with "
                f"Ledger({str(self._ledger.path)!r}).clear_taint({self._participant!r})"
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
        budget = self._mechanism.max_epsilon
        return {
            "epsilon": epsilon,
            **({} if budget is None else {"epsilon_remaining": max(0.0, budget - epsilon)}),
        }
