"""The server's state on disk: a snapshot, and a journal of every merge since."""

from __future__ import annotations

import json
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_ppdl.database import DatabaseFile, DatabaseKind
from lightning_ppdl.errors import ConfigurationError, StateError, StateLockedError, StateWriteError

log = logging.getLogger(__name__)

FILE = "state.db"
_CHUNK_BYTES = 64 * 2**20
"""Of an array in one row: SQLite's rows end at a gigabyte, and vectors do not."""
_MOST_IN_A_COMMIT = 64

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
    schema="""
CREATE TABLE facts (name TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE members (name TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE arrays (
    name TEXT NOT NULL, part INTEGER NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (name, part)
);
CREATE TABLE journal (number INTEGER PRIMARY KEY, document TEXT NOT NULL, message BLOB NOT NULL);
""",
)


@dataclass(frozen=True)
class Accepted:
    """An upload as the books know it.

    Args:
        participant, round, base_version: Of the update.
        digest: Hex: of the message, to know it again.
        encoded_bytes: Of the message.
    """

    participant: str
    round: int
    base_version: int
    digest: str
    encoded_bytes: int


@dataclass(frozen=True)
class JournalEntry:
    """One merge.

    Args:
        message: The encoded update that is merged.
        accepted: The uploads that it is made of, and others whose receipts have been given since the last.
        turns: The state of the turns before it ends those of the uploads.
    """

    message: bytes | bytearray
    accepted: tuple[Accepted, ...]
    turns: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """Everything there was to know after some merge.

    Args:
        document: Strings, numbers, lists and dicts.
        arrays: Numpy arrays by name.
    """

    document: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


class StateDirectory:
    """Makes a server's merges durable before they happen, and gives them back after a restart.

    A merge is entered into the journal, on the disk, before it is applied: no participant is ever shown, or
    given a receipt for, what a restart would take back. Uploads that arrive together share one write. From
    time to time a snapshot takes the journal's place, in one transaction.

    Args:
        path: A directory, made if missing. One server at a time.
        compact_bytes: The journal's size from which a snapshot takes its place, if that is smaller.

    Raises:
        ConfigurationError: if ``path`` cannot be a directory.

    Thread-safe. Nothing is read or written before :meth:`open`.
    """

    def __init__(self, path: str | Path, compact_bytes: int = 64 * 2**20) -> None:
        self.path = Path(path)
        self._compact_bytes = compact_bytes
        self._file: DatabaseFile | None = None
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._after_commit: Callable[[], None] = lambda: None
        self._next = 1
        self._snapshot_bytes = 0
        self.journal_bytes = 0
        """Of the merges since the last snapshot, as they were encoded."""

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
                f"state={str(self.path)!r} cannot be made a directory: {error}; give another path"
            ) from error
        self._file = DatabaseFile(self.path / FILE, _KIND)
        with self._file.reading() as database:
            self.journal_bytes, last = database.execute(
                "SELECT COALESCE(SUM(LENGTH(message)), 0), COALESCE(MAX(number), 0) FROM journal"
            ).fetchone()
            (self._snapshot_bytes,) = database.execute(
                "SELECT COALESCE(SUM(LENGTH(data)), 0) FROM arrays"
            ).fetchone()
        self._next = last + 1
        self._after_commit = after_commit
        self._writer = threading.Thread(target=self._write, name="ppdl-journal", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write what was appended, and let the directory go; once more does nothing."""
        if self._writer is not None:
            self._waiting.put(None)
            if self._writer is not threading.current_thread():
                self._writer.join()
            self._writer = None
        if self._file is not None:
            self._file.close()

    def fact(self, name: str) -> Any:
        """What :meth:`put_fact` stored, None if nothing."""
        with self._opened.reading() as database:
            row = database.execute("SELECT document FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put_fact(self, name: str, value: Any) -> None:
        """Store ``value``, strings and numbers, durably."""
        with self._opened.writing() as database:
            database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def members(self) -> dict[str, Any]:
        """What :meth:`put_member` stored, by name, in the order of the first time."""
        with self._opened.reading() as database:
            rows = database.execute("SELECT name, document FROM members ORDER BY rowid").fetchall()
        return {name: json.loads(document) for name, document in rows}

    def put_member(self, name: str, value: dict[str, Any]) -> None:
        """Store what is known of a member durably."""
        with self._opened.writing() as database:
            database.execute(
                "INSERT INTO members VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET document = excluded.document",
                (name, json.dumps(value)),
            )

    def snapshot(self) -> Snapshot | None:
        """The last one; None if there is none yet."""
        document = self.fact("snapshot")
        if document is None:
            return None
        arrays = {}
        with self._opened.reading() as database:
            shapes = database.execute("SELECT name, dtype, shape FROM arrays WHERE part = 0").fetchall()
            for name, dtype, shape in shapes:
                array = np.empty(tuple(json.loads(shape)), np.dtype(dtype))
                flat, at = array.reshape(-1).view(np.uint8), 0
                parts = database.execute("SELECT data FROM arrays WHERE name = ? ORDER BY part", (name,))
                for (data,) in parts:
                    flat[at : at + len(data)] = np.frombuffer(data, np.uint8)
                    at += len(data)
                arrays[name] = array
        return Snapshot(document, arrays)

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Let ``snapshot`` take the place of the last one, and of every journal entry there is.

        Raises:
            StateWriteError: if it could not be written; the last one and the journal are as they were.
        """
        with self._opened.alone():
            with self._opened.writing() as database:
                database.execute("DELETE FROM arrays")
                for name, array in snapshot.arrays.items():
                    _insert_array(database, name, np.asarray(array, order="C"))
                database.execute(
                    "INSERT OR REPLACE INTO facts VALUES ('snapshot', ?)", (json.dumps(snapshot.document),)
                )
                database.execute("DELETE FROM journal")
            self.journal_bytes = 0
            self._snapshot_bytes = sum(array.nbytes for array in snapshot.arrays.values())

    @property
    def wants_snapshot(self) -> bool:
        """Whether the journal has grown so long that a snapshot should take its place."""
        return self.journal_bytes > max(self._compact_bytes, self._snapshot_bytes)

    def journal(self) -> Iterator[JournalEntry]:
        """The merges since the snapshot, in their order; one at a time in memory."""
        number = 0
        while True:
            with self._opened.reading() as database:
                row = database.execute(
                    "SELECT number, document, message FROM journal WHERE number > ? ORDER BY number LIMIT 1",
                    (number,),
                ).fetchone()
            if row is None:
                return
            number, document, message = row[0], json.loads(row[1]), row[2]
            yield JournalEntry(
                message, tuple(Accepted(**each) for each in document["accepted"]), document["turns"]
            )

    def append(self, entry: JournalEntry, then: Callable[[Exception | None], None]) -> None:
        """Write ``entry`` soon, together with what others append meanwhile.

        Args:
            entry: Entries are written in the order in which they are appended.
            then: Called from another thread once ``entry`` is on the disk, or with what went wrong; in the
                order of the entries.
        """
        self._waiting.put(_Waiting(entry, then))

    def write(self, entry: JournalEntry) -> None:
        """Write ``entry`` before returning.

        Raises:
            StateWriteError: if that cannot be done.
        """
        self._commit([entry])

    def _write(self) -> None:
        """The writing thread."""
        while self._write_waiting():
            pass

    def _write_waiting(self) -> bool:
        """Write all that waits, at least one entry, in one transaction; False when there will be no more."""
        first = self._waiting.get()
        if first is None:
            return False
        batch, more = [first], True
        while more and len(batch) < _MOST_IN_A_COMMIT and not self._waiting.empty():
            following = self._waiting.get()
            if following is None:
                more = False
            else:
                batch.append(following)
        problem: Exception | None = None
        try:
            self._commit([waiting.entry for waiting in batch])
        except Exception as error:  # whatever it is, those who wait for an answer must get one
            problem = error
        for waiting in batch:
            waiting.then(problem)
        if problem is None:
            self._after_commit()
        return more

    def _commit(self, entries: Sequence[JournalEntry]) -> None:
        documents = [
            json.dumps({"accepted": [vars(each) for each in entry.accepted], "turns": entry.turns})
            for entry in entries
        ]
        with self._opened.alone():
            rows = [
                (self._next + position, document, entry.message)
                for position, (document, entry) in enumerate(zip(documents, entries))
            ]
            with self._opened.writing() as database:
                database.executemany("INSERT INTO journal VALUES (?, ?, ?)", rows)
            self._next += len(rows)
            self.journal_bytes += sum(len(entry.message) for entry in entries)

    @property
    def _opened(self) -> DatabaseFile:
        if self._file is None:
            raise StateError(f"state={str(self.path)!r} has not been opened")
        return self._file


@dataclass(frozen=True)
class _Waiting:
    entry: JournalEntry
    then: Callable[[Exception | None], None]


def _insert_array(database: sqlite3.Connection, name: str, array: npt.NDArray[Any]) -> None:
    raw = array.reshape(-1).view(np.uint8).data
    for part, start in enumerate(range(0, max(1, len(raw)), _CHUNK_BYTES)):
        database.execute(
            "INSERT INTO arrays VALUES (?, ?, ?, ?, ?)",
            (name, part, array.dtype.str, json.dumps(array.shape), raw[start : start + _CHUNK_BYTES]),
        )
