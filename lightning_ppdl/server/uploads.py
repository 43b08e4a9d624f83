"""From an update that arrives to its receipt: checked, entered in the journal, merged."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any

from lightning_ppdl import wire
from lightning_ppdl.errors import AdmissionError, AuthenticationError
from lightning_ppdl.records import Receipt, SparseUpdate
from lightning_ppdl.server.admission import check_update
from lightning_ppdl.server.books import Member
from lightning_ppdl.server.durability import Durability
from lightning_ppdl.server.holdings import Holdings
from lightning_ppdl.server.journal import Accepted, JournalEntry
from lightning_ppdl.server.state import StateDirectory


class Arrival:
    """An encoded update as it came. To be made before the others are kept waiting: what takes long is done
    at once, and what is wrong is said by :attr:`update`, after it is known who may ask at all.

    Args:
        message: Its bytes.
        size: P.
    """

    def __init__(self, message: bytes | bytearray, size: int) -> None:
        self.message = message
        self._update: SparseUpdate | AdmissionError
        try:
            self._update = wire.decode_update(message, size)
        except AdmissionError as error:
            self._update = error
        self.digest = hashlib.sha256(message).hexdigest()

    @property
    def update(self) -> SparseUpdate:
        """What the message says.

        Raises:
            AdmissionError: if it is no update.
        """
        if isinstance(self._update, AdmissionError):
            raise self._update
        return self._update


class Uploads:
    """Merges what participants upload, each update exactly once, by itself or with others' at the end of a
    cycle.

    Args:
        held: What the updates change; its lock is held by whoever calls a method.
    """

    def __init__(self, held: Holdings) -> None:
        self._held = held

    def go_on(
        self, state: StateDirectory, protocol: str, merge: dict[str, Any], members: Collection[str] | None
    ) -> None:
        """Write into the journal of ``state`` from now on, after what its last server merged has been merged
        again.

        Args:
            state: Not open yet.
            protocol, merge: Name of the exchange protocol, and what describes the merge rule.
            members: The names that may take part from now on, None for any.

        Raises:
            StateError: if the directory cannot be used.
            ConfigurationError: if it belongs to a collaboration with other rules.
        """
        held = self._held
        state.open(after_commit=self._compact)
        try:
            durability = Durability(state, held.vector, held.books, held.turns)
            held.study = durability.identify(held.study, protocol, merge)
            durability.restore(self._apply, held.clock(), members)
        except BaseException:
            state.close()
            raise
        held.durability = durability

    def accept(self, member: Member, arrival: Arrival) -> Future[Receipt]:
        """Take one round of ``member``, and end its turn.

        Returns:
            The receipt, as soon as the upload is as durable as this server makes it.

        Raises:
            AdmissionError: one subclass for each reason to refuse; nothing is changed then.
        """
        held, update = self._held, arrival.update
        if update.participant != member.name:
            raise AuthenticationError(
                f"update of participant {update.participant!r}: this session is {member.name!r}'s; "
                f"nobody uploads for another"
            )
        if (answer := member.answered(update, arrival.digest)) is not None:
            return answer
        context = held.vector.context(update)
        check_update(update, member.manifest, held.vector.version)
        held.turns.renew(member.name)
        held.turns.collect(update, context)
        accepted = Accepted(
            member.name, update.round, update.base_version, arrival.digest, len(arrival.message)
        )
        if held.turns.collects:
            answer = Future()
            answer.set_result(self._enter(accepted, held.vector.version))
            if held.durability is not None:
                held.durability.collected.append(accepted)
            self.merge_due()
            held.notify()
            return answer
        entry = JournalEntry(arrival.message, (accepted,), held.turns.state_dict())
        return self._merge_by_itself(member, update, entry)

    def merge_due(self) -> None:
        """Merge the mean of what the protocol has collected, if a cycle is complete."""
        update = self._held.turns.due()
        if update is None:
            return
        if self._held.durability is None:
            self._held.vector.merge(update)
        elif not self._held.durability.merge(update):
            return
        self._compact()
        self._held.notify()

    def _merge_by_itself(self, member: Member, update: SparseUpdate, entry: JournalEntry) -> Future[Receipt]:
        """Merge an upload as soon as it is durable."""
        held = self._held
        answer: Future[Receipt] = Future()
        # One of those who wait for it may give up; the upload goes on, and a retry waits for the same answer.
        answer.set_running_or_notify_cancel()

        def settle(problem: Exception | None) -> bool:
            receipt = None
            with held.changed:
                held.books.members[member.name].pending = None
                before = {} if held.durability is None else held.turns.state_dict()
                try:
                    if problem is None:
                        (receipt,) = self._apply(entry, update)
                except Exception as error:  # a merge rule's, and its uploader's to be told of
                    problem = error
                if receipt is not None and held.durability is not None:
                    held.durability.applied(entry, before)
                    held.note_turns()
            if receipt is not None:
                answer.set_result(receipt)
            else:
                answer.set_exception(problem)
            return receipt is not None

        if held.durability is None:
            settle(None)
        else:
            held.durability.state.append(entry, settle)
            member.pending = (entry.accepted[0].digest, answer)
        return answer

    def _apply(self, entry: JournalEntry, update: SparseUpdate) -> list[Receipt]:
        """Merge what is in the journal, for the first time or again after a restart, and end the turns that
        led to it."""
        held = self._held
        version = held.vector.version
        if held.turns.collects:  # the receipts came before the merge, and hold whatever became of it
            receipts = [self._enter(upload, version) for upload in entry.accepted]
        if entry.failed:
            held.vector.rehearse(update)
            return []
        held.vector.merge(update)
        if not held.turns.collects:
            receipts = [self._enter(upload, version) for upload in entry.accepted]
        for upload in entry.accepted:
            held.turns.end(upload.participant)
        held.notify()
        return receipts

    def _enter(self, upload: Accepted, version: int) -> Receipt:
        """Enter ``upload`` as part of what changes ``version`` into the next one."""
        receipt = Receipt(upload.round, version + 1, version - upload.base_version)
        self._held.books.accept(upload, receipt)
        return receipt

    def _compact(self) -> None:
        """Let a snapshot take the journal's place if that has grown long. Called from any thread."""
        with self._held.changed:
            if self._held.durability is not None:
                self._held.durability.compact()
