"""What a state directory holds, and how it lies in the tables."""

from __future__ import annotations

import json
import sqlite3
import zlib
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from lightning_ppdl.server import blobs

SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE members (name TEXT PRIMARY KEY, document TEXT NOT NULL);
{blobs.TABLE.strip()}
CREATE TABLE journal (
    number INTEGER PRIMARY KEY, write INTEGER NOT NULL, failed INTEGER NOT NULL, document TEXT NOT NULL,
    message BLOB NOT NULL, checksum INTEGER NOT NULL
);
"""


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
        number: Its place in the journal, from 1; 0 for an entry that is not written yet.
        failed: Whether it is known that the merge rule raised.
        last: Whether it was part of the last write before the server was killed, after which such knowledge
            may have been lost.
    """

    message: bytes | bytearray
    accepted: tuple[Accepted, ...]
    turns: dict[str, Any]
    number: int = 0
    failed: bool = False
    last: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Everything there was to know after some merge.

    Args:
        document: Strings, numbers, lists and dicts.
        arrays: Numpy arrays by name.
    """

    document: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


@dataclass
class Row:
    """A journal entry on its way to the disk; its number is known once it is there."""

    document: str
    message: bytes | bytearray
    checksum: int
    number: int = 0

    @classmethod
    def of(cls, entry: JournalEntry) -> Row:
        """Encode ``entry``, in the thread that appends it: others' entries do not fail with it."""
        document = json.dumps({"accepted": [vars(each) for each in entry.accepted], "turns": entry.turns})
        return cls(document, entry.message, zlib.crc32(entry.message))

    @property
    def size_bytes(self) -> int:
        return len(self.message) + len(self.document)

    def insert(self, database: sqlite3.Connection, write: int) -> None:
        row = (self.number, write, 0, self.document, self.message, self.checksum)
        database.execute("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?)", row)


@dataclass(frozen=True)
class Fact:
    """Something small that is known by a name."""

    name: str
    document: str

    def insert(self, database: sqlite3.Connection) -> None:
        database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (self.name, self.document))


def entry_after(number: int, database: sqlite3.Connection) -> JournalEntry | None:
    """The first entry behind ``number``; None where the journal ends.

    Raises:
        sqlite3.DatabaseError: if it is not as it was written.
    """
    row = database.execute(
        "SELECT number, failed, write = (SELECT write FROM journal ORDER BY number DESC LIMIT 1) "
        "AND number > COALESCE((SELECT CAST(document AS INTEGER) FROM facts WHERE name = 'settled'), 0), "
        "document, message, checksum FROM journal WHERE number > ? ORDER BY number LIMIT 1",
        (number,),
    ).fetchone()
    if row is None:
        return None
    number, failed, last, text, message, checksum = row
    blobs.require_checksum(message, checksum, f"entry {number} of the journal")
    document = json.loads(text)
    accepted = tuple(Accepted(**each) for each in document["accepted"])
    return JournalEntry(message, accepted, document["turns"], number, bool(failed), bool(last))


def settled_through(number: int) -> Fact:
    """Of all entries up to this one it is known whether they were merged."""
    return Fact("settled", json.dumps(number))


def replace_snapshot(database: sqlite3.Connection, snapshot: Snapshot) -> None:
    """Let ``snapshot`` take the place of the last one, and of the journal."""
    blobs.replace_arrays(database, snapshot.arrays)
    Fact("snapshot", json.dumps(snapshot.document)).insert(database)
    database.execute("DELETE FROM journal")
    database.execute("DELETE FROM facts WHERE name = 'settled'")  # numbers may begin anew


def mark_failed(database: sqlite3.Connection, numbers: list[int]) -> None:
    """Enter that the merge rule raised at these entries."""
    database.executemany("UPDATE journal SET failed = 1 WHERE number = ?", [(number,) for number in numbers])
