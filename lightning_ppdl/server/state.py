"""The server's state on disk: a snapshot, and a journal of every merge since."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_ppdl.database import DatabaseFile, DatabaseKind
from lightning_ppdl.errors import ConfigurationError, StateError, StateLockedError, StateWriteError
from lightning_ppdl.server import blobs
from lightning_ppdl.server.group_commit import GroupCommit, Then
from lightning_ppdl.server.journal import (
    SCHEMA,
    Fact,
    JournalEntry,
    Row,
    Snapshot,
    entry_after,
    mark_failed,
    replace_snapshot,
    settled_through,
)

log = logging.getLogger(__name__)

FILE = "state.db"

_KIND = DatabaseKind(
    noun="state",
    application=0x70706473,  # "ppds"
    version=1,
    journal_mode="WAL",
    in_use="one server at a time serves from it; end that one, or give another directory",
    damaged="Put the latest backup of the directory in its place, or begin a new collaboration in another",
    unwritten="nothing was changed",
    error=StateError,
    locked_error=StateLockedError,
    write_error=StateWriteError,
    schema=SCHEMA,
)


class StateDirectory:
    """Makes a server's merges durable before they happen, and gives them back after a restart.

    A merge is entered into the journal, on the disk, before it is applied: no participant is ever shown, or
    given a receipt for, what a restart would take back. Uploads that arrive together share one write. From
    time to time a snapshot takes the journal's place, in one transaction.

    Args:
        path: A directory, made if missing. One server at a time.
        compact_bytes: The journal's size from which a snapshot takes its place, unless that would be larger.

    Raises:
        ConfigurationError: if ``path`` cannot be a directory.

    Thread-safe. Nothing is read or written before :meth:`open`.

    =============================  ========================================================================
    killed before the write        no receipt was given; the upload is unknown, and can be sent again
    killed after it                merged when the server starts again; a retry gets the receipt
    disk full                      StateWriteError, nothing changed; goes on once there is room
    no room for a snapshot         the journal stays and grows on
    damaged, or moved while open   StateError or StateWriteError; never taken for a new collaboration
    =============================  ========================================================================
    """

    def __init__(self, path: str | Path, compact_bytes: int = 64 * 2**20) -> None:
        self.path = Path(path)
        self._compact_bytes = compact_bytes
        self._file: DatabaseFile | None = None
        self._group: GroupCommit[Row | Fact] | None = None
        self._after_commit: Callable[[], None] = lambda: None
        self._next = 1
        self._unmarked: list[int] = []
        self._snapshot_bytes = 0
        self._snapshot_failed_at = 0
        self.journal_bytes = 0
        """Of the merges since the last snapshot."""

    def open(self, after_commit: Callable[[], None]) -> None:
        """Take hold of the directory.

        Args:
            after_commit: Called, in the writing thread, when entries that were appended have been applied.

        Raises:
            StateLockedError: if another server holds it.
            StateError: if it is damaged, or of a later version.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"state={str(self.path)!r} cannot be made a directory ({error.strerror or error}); give "
                f"another path"
            ) from error
        file = DatabaseFile(self.path / FILE, _KIND)
        try:
            with file.reading() as database:
                self.journal_bytes, last = database.execute(
                    "SELECT COALESCE(SUM(LENGTH(message) + LENGTH(document)), 0), COALESCE(MAX(number), 0) "
                    "FROM journal"
                ).fetchone()
                (self._snapshot_bytes,) = database.execute(
                    "SELECT COALESCE(SUM(LENGTH(data)), 0) FROM arrays"
                ).fetchone()
        except BaseException:
            file.close()
            raise
        self._file, self._next, self._unmarked, self._snapshot_failed_at = file, last + 1, [], 0
        self._after_commit = after_commit
        self._group = GroupCommit(self._commit, self._committed)

    def close(self) -> None:
        """Write what was appended, and let the directory go; once more does nothing."""
        if self._group is not None:
            done = self._group.close()
            self._group = None
            if done and self.journal_bytes:
                try:
                    self._commit([settled_through(self._next - 1)])
                except StateError as error:
                    log.debug("that all merges were made is not noted: %s", error)
        if self._file is not None:
            self._file.close()

    def fact(self, name: str) -> Any:
        """What :meth:`put_fact` or :meth:`note` stored, None if nothing."""
        with self._opened.reading() as database:
            row = database.execute("SELECT document FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put_fact(self, name: str, value: Any) -> None:
        """Store ``value``, strings and numbers, durably."""
        with self._opened.writing() as database:
            Fact(name, json.dumps(value)).insert(database)

    def members(self) -> dict[str, Any]:
        """What :meth:`put_member` stored, by name, in the order of the first time."""
        with self._opened.reading() as database:
            rows = database.execute("SELECT name, document FROM members ORDER BY rowid").fetchall()
        return {name: json.loads(document) for name, document in rows}

    def put_member(self, name: str, value: dict[str, Any], snapshot: Snapshot | None = None) -> None:
        """Store what is known of a member durably; with a snapshot, both or neither."""
        with self._opened.alone():
            with self._opened.writing() as database:
                database.execute(
                    "INSERT INTO members VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET document = excluded.document",
                    (name, json.dumps(value)),
                )
                if snapshot is not None:
                    replace_snapshot(database, snapshot)
            if snapshot is not None:
                self._begin_journal(snapshot)

    def snapshot(self) -> Snapshot | None:
        """The last one; None if there is none yet."""
        document = self.fact("snapshot")
        if document is None:
            return None
        with self._opened.reading() as database:
            return Snapshot(document, blobs.read_arrays(database))

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Let ``snapshot`` take the place of the last one, and of every journal entry there is.

        Raises:
            StateWriteError: if it could not be written; the last one and the journal are as they were.
        """
        with self._opened.alone():
            try:
                with self._opened.writing() as database:
                    replace_snapshot(database, snapshot)
            except StateWriteError:
                self._snapshot_failed_at = self.journal_bytes
                raise
            self._begin_journal(snapshot)

    @property
    def wants_snapshot(self) -> bool:
        """Whether the journal has grown so long that a snapshot should take its place; after one that failed,
        not before it has grown as much again."""
        grown = self.journal_bytes - self._snapshot_failed_at
        return grown > max(self._compact_bytes, self._snapshot_bytes)

    def journal(self) -> Iterator[JournalEntry]:
        """The merges since the snapshot, in their order; one at a time in memory."""
        number = 0
        while True:
            with self._opened.reading() as database:
                entry = entry_after(number, database)
            if entry is None:
                return
            yield entry
            number = entry.number

    def append(self, entry: JournalEntry, then: Then) -> None:
        """Write ``entry`` soon, together with what others append meanwhile.

        Args:
            entry: Entries are written in the order in which they are appended.
            then: Called from another thread once ``entry`` is on the disk, or with what went wrong; in the
                order of the entries. Says whether it was merged.
        """
        self._writer.add(Row.of(entry), then)

    def note(self, name: str, value: Any, then: Then) -> None:
        """Store a fact soon, after the entries that have been appended; arguments as there."""
        self._writer.add(Fact(name, json.dumps(value)), then)

    def write(self, entry: JournalEntry, merge: Callable[[], None]) -> None:
        """Write ``entry`` before merging it.

        Raises:
            StateWriteError: if it cannot be written.
            Exception: what ``merge`` raises; that it did is marked in the journal.
        """
        self._commit([row := Row.of(entry)])
        try:
            merge()
        except BaseException:
            self.mark_failed(row.number)
            raise

    def mark_failed(self, *numbers: int) -> None:
        """Remember that these entries were not merged; on the disk before the next entry is."""
        if numbers:
            try:
                with self._opened.alone():
                    self._unmarked += numbers
                    self._commit([])
            except StateWriteError as error:
                log.debug("a merge that failed is not marked yet: %s", error)

    def _commit(self, group: Sequence[Row | Fact]) -> None:
        with self._opened.alone():
            number = self._next
            with self._opened.writing() as database:
                mark_failed(database, self._unmarked)
                for item in group:
                    if isinstance(item, Row):
                        item.number = number
                        number += 1
                        item.insert(database, write=self._next)
                    else:
                        item.insert(database)
            self._next = number
            self._unmarked = []
            self.journal_bytes += sum(item.size_bytes for item in group if isinstance(item, Row))

    def _committed(self, unused: list[Row | Fact]) -> None:
        self.mark_failed(*(item.number for item in unused if isinstance(item, Row)))
        self._after_commit()

    def _begin_journal(self, snapshot: Snapshot) -> None:
        self.journal_bytes = self._snapshot_failed_at = 0
        self._unmarked = []
        self._snapshot_bytes = sum(array.nbytes for array in snapshot.arrays.values())

    @property
    def _opened(self) -> DatabaseFile:
        if self._file is None:
            raise StateError(f"state={str(self.path)!r} is not open; call open()")
        return self._file

    @property
    def _writer(self) -> GroupCommit[Row | Fact]:
        if self._group is None:
            raise StateError(f"state={str(self.path)!r} is not open; call open()")
        return self._group
