"""What a server must not forget, between its objects and its state directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from lightning_ppdl import wire
from lightning_ppdl.errors import AdmissionError, ConfigurationError, StateError, StateWriteError
from lightning_ppdl.records import Receipt, SparseUpdate
from lightning_ppdl.server.books import Books, Member
from lightning_ppdl.server.journal import Accepted, JournalEntry, Snapshot
from lightning_ppdl.server.state import StateDirectory
from lightning_ppdl.server.turns import Turns
from lightning_ppdl.server.vector import SharedVector

log = logging.getLogger(__name__)

_TOTALS = ("uploads", "uploaded_bytes", "downloads", "downloaded_bytes")


class Durability:
    """Writes one server's changes into its state directory, and restores them.

    Not kept are leases (whoever had the turn gets a new one), times, histograms, downloads counted since the
    last snapshot, and what an open cycle of the synchronous protocol has collected.

    Whose turn comes when is part of each journal entry. What changes it in between (somebody joins, leaves,
    or loses its turn) is noted beside the journal, with the version at which it was so: a note of another
    version than the last is older than the last entry.

    Args:
        state: Open.
        vector, books, turns: The server's, as new.
    """

    def __init__(self, state: StateDirectory, vector: SharedVector, books: Books, turns: Turns) -> None:
        self.state = state
        self._vector = vector
        self._books = books
        self._turns = turns
        self._begun = False
        # Which turns a restart would find; None if that is not known.
        self._found: dict[str, Any] | None = None
        self.collected: list[Accepted] = []
        """Uploads that were given a receipt and are in no journal entry yet."""

    def identify(self, study: str, protocol: str, merge: dict[str, Any]) -> str:
        """Begin the collaboration ``study``, or say which one the directory holds.

        Args:
            study: For a new directory.
            protocol: Name of the exchange protocol.
            merge: Describes the merge rule.

        Raises:
            ConfigurationError: if the directory's collaboration began with other rules.
        """
        rules = json.loads(json.dumps({"protocol": protocol, "merge": merge}))
        kept = self.state.fact("study")
        if kept is None:
            self.state.put_fact("study", {"id": study, "rules": rules})
            return study
        if (difference := _first_difference(rules, kept["rules"])) is not None:
            name, now, began = difference
            raise ConfigurationError(
                f"{name}={now}: the collaboration in state={str(self.state.path)!r} began with {began}. "
                f"Serve it with that, or begin another one in an empty directory, with initial=FILE to start "
                f"from what this one has learnt (ppdl export)"
            )
        return str(kept["id"])

    def restore(
        self,
        apply: Callable[[JournalEntry, SparseUpdate], object],
        now: float,
        members: Collection[str] | None,
    ) -> None:
        """Bring back the last snapshot, merge again what was merged after it, and let the turns go on.

        Args:
            apply: Merges an entry as the first time, or fails as then; need not end turns.
            now: Seconds, on the server's clock.
            members: The names that may take part from now on, None for any: the session of another is over.

        Raises:
            StateError: if something cannot be read, or be merged as it was.
        """
        for name, fields in self.state.members().items():
            member = Member.from_primitives(name, fields, now)
            if members is not None and name not in members:
                member.session = ""
            self._books.enter(member)
        everyone = self._books.members.values()
        snapshot = self.state.snapshot()
        turns: dict[str, Any] | None = None
        ended: tuple[Accepted, ...] = ()
        if snapshot is None:
            for member in everyone:
                self._vector.declare(member.manifest, f"state={self.state.path}")
        else:
            self._begun = True
            self._restore_snapshot(snapshot)
            turns = snapshot.document["turns"]
            for entry in self.state.journal():
                merged = self._replay(entry, apply)
                turns, ended = entry.turns, entry.accepted if merged else ()
        noted = self.state.fact("turns")
        if noted is not None and noted["version"] == self._vector.version:
            turns, ended = noted["turns"], ()
        if turns is not None:
            self._turns.load_state_dict(turns)
            for upload in ended:
                self._turns.end(upload.participant)
        self._found = self._turns.state_dict()
        self._turns.resume()
        for member in everyone:
            if not member.session:  # what became of its turn may not have been noted
                self._turns.leave(member.name)
        if self._vector.filled and not self._begun:
            self.snapshot()
        self.note_turns()
        if everyone:
            log.info(
                "goes on from %s at version %d with %d members",
                self.state.path,
                self._vector.version,
                len(everyone),
            )

    def put(self, member: Member) -> None:
        """Make a membership durable, and with the first one what the collaboration begins with.

        Raises:
            StateWriteError: if that cannot be done.
        """
        begins = self._vector.filled and not self._begun
        snapshot = self._snapshot() if begins else None
        self.state.put_member(member.name, member.to_primitives(), snapshot)
        self._begun = self._begun or begins

    def note_turns(self) -> None:
        """Have it written soon whose turn comes when, unless a restart would find that already."""
        turns = self._turns.state_dict()
        if turns != self._found:
            self._found = turns
            try:
                self.state.note("turns", {"version": self._vector.version, "turns": turns}, self._noted)
            except StateError as error:  # closed meanwhile
                self._noted(error)

    def applied(self, entry: JournalEntry, before: dict[str, Any]) -> None:
        """``entry`` was merged, and turns were ended that stood as ``before``: a restart will do the same."""
        self._found = self._turns.state_dict() if before == entry.turns else None

    def merge(self, update: SparseUpdate) -> bool:
        """Enter the mean of a cycle and merge it; False if that cannot be done, and the cycle is lost.

        Raises:
            Exception: the merge rule's.
        """
        message = wire.encode_update(update, self._vector.size)
        entry = JournalEntry(message, tuple(self.collected), self._turns.state_dict())

        def merge() -> None:
            self.collected.clear()  # they are in the journal
            self._vector.merge(update)

        try:
            self.state.write(entry, merge)
        except StateWriteError as error:
            log.error("cycle %d is lost, nothing of it is merged: %s", update.round, error)
            return False
        self._found = entry.turns
        return True

    def snapshot(self) -> None:
        """Let the present take the place of the journal.

        Raises:
            StateWriteError: if it could not be written; the journal is as it was.
        """
        self.state.put_snapshot(self._snapshot())
        self._begun = True

    def compact(self) -> None:
        """Make a snapshot if the journal has grown long. Everything in it has been merged."""
        if self.state.wants_snapshot:
            try:
                self.snapshot()
            except StateWriteError as error:
                log.warning("the journal was not compacted, and goes on growing: %s", error)

    def _snapshot(self) -> Snapshot:
        numbers, arrays = self._vector.save()
        traffic = self._books.traffic
        document = {
            "vector": numbers,
            "turns": self._turns.state_dict(),
            "totals": {name: getattr(traffic, name) for name in _TOTALS},
            "rounds": {
                name: (member.rounds, member.digest, member.receipt and asdict(member.receipt))
                for name, member in self._books.members.items()
            },
        }
        return Snapshot(document, arrays)

    def _restore_snapshot(self, snapshot: Snapshot) -> None:
        document, members = snapshot.document, self._books.members
        first = next(iter(members.values()))
        self._vector.restore(first.manifest, document["vector"], snapshot.arrays)
        for name in _TOTALS:
            setattr(self._books.traffic, name, document["totals"][name])
        for name, (rounds, digest, receipt) in document["rounds"].items():
            member = members[name]
            member.rounds, member.digest = rounds, digest
            member.receipt = None if receipt is None else Receipt(**receipt)

    def _replay(self, entry: JournalEntry, apply: Callable[[JournalEntry, SparseUpdate], object]) -> bool:
        """Merge ``entry`` again, or fail at it again; whether it was merged."""
        where = f"entry {entry.number} of the journal in {self.state.path}"
        try:
            update = wire.decode_update(entry.message, self._vector.size)
        except AdmissionError as error:
            raise StateError(
                f"{where} cannot be read ({error}); serve it with the version of lightning_ppdl that wrote it"
            ) from error
        try:
            apply(entry, update)
        except Exception as error:
            # It failed the first time as well, and nothing was changed then either. But a receipt that was
            # given must never be taken back, because a rule has been altered, or memory is short.
            if isinstance(error, MemoryError) or not (entry.failed or entry.last):
                raise StateError(
                    f"{where} was merged before and cannot be now ({type(error).__name__}: {error}); serve "
                    f"it with the merge rule that it was merged by"
                ) from error
            log.warning("an upload that could not be merged is passed over: %s", error)
            self.state.mark_failed(entry.number)
            return False
        return not entry.failed

    def _noted(self, problem: Exception | None) -> bool:
        if problem is not None:
            self._found = None
            log.debug("whose turn comes when could not be noted: %s", problem)
        return True


def _first_difference(now: dict[str, Any], began: dict[str, Any]) -> tuple[str, object, object] | None:
    """Where, in what both say: another version of torch knows other settings of its optimizers."""
    for name in now:
        if name not in began or now[name] == began[name]:
            continue
        if isinstance(now[name], dict) and isinstance(began[name], dict):
            if (inner := _first_difference(now[name], began[name])) is not None:
                return f"{name}.{inner[0]}".removesuffix(".kind"), *inner[1:]
        else:
            return name, now[name], began[name]
    return None
