"""What a server must not forget, between its objects and its state directory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict

from lightning_ppdl import wire
from lightning_ppdl.errors import ConfigurationError, MergeError, StateWriteError
from lightning_ppdl.records import Receipt, SparseUpdate
from lightning_ppdl.server.books import Books, Member
from lightning_ppdl.server.state import Accepted, JournalEntry, Snapshot, StateDirectory
from lightning_ppdl.server.turns import Turns
from lightning_ppdl.server.vector import SharedVector

log = logging.getLogger(__name__)

_TOTALS = ("uploads", "uploaded_bytes", "downloads", "downloaded_bytes")


class Durability:
    """Writes one server's changes into its state directory, and restores them.

    Not kept are leases (whoever had the turn gets a new one), times, histograms, and what an open cycle of
    the synchronous protocol has collected.

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
        self.collected: list[Accepted] = []
        """Uploads that were given a receipt and are in no journal entry yet."""

    def identify(self, study: str, **rules: object) -> str:
        """Begin the collaboration ``study``, or say which one the directory holds.

        Args:
            study: For a new directory.
            rules: The objects that decide what merges do.

        Raises:
            ConfigurationError: if the directory's collaboration began with other rules.
        """
        names = {name: type(rule).__name__ for name, rule in rules.items()}
        kept = self.state.fact("study")
        if kept is None:
            self.state.put_fact("study", {"id": study, "rules": names})
            return study
        for name, kind in names.items():
            if kept["rules"][name] != kind:
                raise ConfigurationError(
                    f"{name}={kind}: the collaboration in state={str(self.state.path)!r} began with "
                    f"{kept['rules'][name]}. Serve it with that, or begin another one in an empty "
                    f"directory, with initial=FILE to start from what this one has learnt (ppdl export)"
                )
        return str(kept["id"])

    def restore(self, apply: Callable[[JournalEntry, SparseUpdate], object], now: float) -> None:
        """Bring back the last snapshot, and merge again what was merged after it.

        Args:
            apply: Merges an entry as the first time.
            now: Seconds, on the server's clock.
        """
        for name, fields in self.state.members().items():
            self._books.enter(member := Member.from_primitives(name, fields, now))
            self._vector.declare(member.manifest, f"state={self.state.path}")
        snapshot = self.state.snapshot()
        if snapshot is None:
            return
        self._begun = True
        document = snapshot.document
        self._vector.restore(document["vector"], snapshot.arrays)
        self._turns.load_state_dict(document["turns"])
        for name in _TOTALS:
            setattr(self._books.traffic, name, document["totals"][name])
        for name, (rounds, digest, receipt) in document["rounds"].items():
            member = self._books.members[name]
            member.rounds, member.digest = rounds, digest
            member.receipt = None if receipt is None else Receipt(**receipt)
        count = 0
        for entry in self.state.journal():
            self._turns.load_state_dict(entry.turns)
            try:
                apply(entry, wire.decode_update(entry.message, self._vector.size))
            except MergeError as error:  # and so it was at the first time: nothing was changed then either
                log.warning("an upload that could not be merged is passed over: %s", error)
            count += 1
        log.info(
            "goes on from %s at version %d with %d members; %d merges were in the journal",
            self.state.path,
            self._vector.version,
            len(self._books.members),
            count,
        )

    def put(self, member: Member) -> None:
        """Make a membership durable, and with the first one what the collaboration begins with.

        Raises:
            StateWriteError: if that cannot be done.
        """
        self.state.put_member(member.name, member.to_primitives())
        if self._vector.filled and not self._begun:
            self.snapshot()

    def write(self, update: SparseUpdate) -> bool:
        """Enter the merge of a cycle's mean; False if that cannot be done, and the cycle is lost."""
        message = wire.encode_update(update, self._vector.size)
        try:
            self.state.write(JournalEntry(message, tuple(self.collected), self._turns.state_dict()))
        except StateWriteError as error:
            log.error("cycle %d is lost, nothing of it is merged: %s", update.round, error)
            return False
        self.collected.clear()
        return True

    def snapshot(self) -> None:
        """Let the present take the place of the journal.

        Raises:
            StateWriteError: if it could not be written; the journal is as it was.
        """
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
        self.state.put_snapshot(Snapshot(document, arrays))
        self._begun = True

    def compact(self) -> None:
        """Make a snapshot if the journal has grown long."""
        if self.state.wants_snapshot:
            try:
                self.snapshot()
            except StateWriteError as error:
                log.warning("the journal was not compacted, and goes on growing: %s", error)
