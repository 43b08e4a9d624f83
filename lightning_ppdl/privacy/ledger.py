"""What a data set's private releases have cost so far: written durably before anything is sent."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_ppdl.database import DatabaseFile, DatabaseKind
from lightning_ppdl.errors import (
    ConfigurationError,
    LedgerBehindError,
    LedgerError,
    LedgerLockedError,
    LedgerWriteError,
)
from lightning_ppdl.privacy.accounting import require_accountable
from lightning_ppdl.privacy.events import PrivacyEvent, event_from_json

_KIND = DatabaseKind(
    noun="ledger",
    application=0x7070646C,  # "ppdl"
    version=1,
    journal_mode="DELETE",
    in_use="a data set has one ledger, and one run at a time may spend from it; wait for that run, or end it",
    damaged="Put its latest backup in its place and merge what checkpoints hold; a new, empty ledger would "
    "forget what was spent",
    unwritten="nothing may be sent",
    error=LedgerError,
    locked_error=LedgerLockedError,
    write_error=LedgerWriteError,
    schema="""
CREATE TABLE entries (
    id TEXT PRIMARY KEY, study TEXT NOT NULL, participant TEXT NOT NULL, round INTEGER NOT NULL,
    event TEXT, released_values INTEGER NOT NULL, at REAL NOT NULL
);
CREATE INDEX by_participant ON entries (study, participant, round);
CREATE TABLE unsent (
    study TEXT NOT NULL, participant TEXT NOT NULL, id TEXT NOT NULL REFERENCES entries (id),
    message BLOB NOT NULL, PRIMARY KEY (study, participant)
);
CREATE TABLE taints (participant TEXT PRIMARY KEY, reason TEXT NOT NULL);
""",
)
_COLUMNS = "id, study, participant, round, event, released_values, at"


@dataclass(frozen=True)
class LedgerEntry:
    """One release, or private steps that were never released.

    Args:
        id: Unique; see :meth:`new`.
        study: The collaboration's identity.
        participant: The name used there.
        round: The participant's round.
        event: What it cost; None where that was paid for already.
        released_values: Entries of the update that left; 0 where none did.
        at: Seconds since 1970.
    """

    id: str
    study: str
    participant: str
    round: int
    event: PrivacyEvent | None
    released_values: int
    at: float

    @classmethod
    def new(
        cls, study: str, participant: str, round: int, event: PrivacyEvent | None, released_values: int = 0
    ) -> LedgerEntry:
        """An entry of this moment, under an id of its own."""
        return cls(uuid.uuid4().hex, study, participant, round, event, released_values, time.time())

    def to_primitives(self) -> dict[str, Any]:
        """Strings and numbers only, for a checkpoint."""
        return {**asdict(self), "event": None if self.event is None else self.event.to_json()}

    @classmethod
    def from_primitives(cls, fields: dict[str, Any]) -> LedgerEntry:
        """The entry that :meth:`to_primitives` wrote.

        Raises:
            ConfigurationError: if it is none, or its event cannot be accounted for.
        """
        try:
            event = fields["event"]
            entry = cls(**{**fields, "event": None if event is None else _event(event)})
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"{fields!r} is no entry of a ledger: {error}") from error
        if not isinstance(entry.round, int) or not isinstance(entry.at, int | float):
            raise ConfigurationError(f"round={entry.round!r} and at={entry.at!r} must be numbers")
        return entry


@dataclass(frozen=True)
class Unsent:
    """A release that was paid for, and whose receipt has not come yet."""

    entry: LedgerEntry
    message: bytes


class Ledger:
    """The spending of one data set, over all runs, studies and servers.

    One file, in the hands of one process at a time; its threads may share it. :meth:`record` returns only
    when the entry and the encoded release are on the disk, in one transaction; what is sent afterwards can be
    sent again, byte for byte, and is counted once. A process killed at any instant leaves nothing sent that
    is not counted.

    Args:
        path: The file, made if missing; its directory must exist. None keeps the ledger in memory, for
            simulations.

    Raises:
        LedgerLockedError: if another run holds it.
        LedgerError: if the file is damaged, no ledger, of a later version, not writable, or holds an entry
            that cannot be accounted for.

    What it cannot detect: a copy of the whole machine that goes on with a server of its own, and a ledger put
    back to an older state together with a new server.

    ============================  ===========================================================================
    killed before ``record``      nothing counted, nothing sent
    killed within ``record``      counted or not, nothing sent
    killed after ``record``       counted; :meth:`pending` gives the bytes to send again
    disk full, or read-only       LedgerWriteError, the ledger unchanged, nothing may be sent
    file moved away while open    LedgerWriteError
    same entry twice              ConfigurationError from ``record``; :meth:`merge` passes over it
    ============================  ===========================================================================
    """

    def __init__(self, path: str | Path | None) -> None:
        self._file = DatabaseFile(path, _KIND)
        self.path = self._file.path
        self._revision = 0
        try:
            self._require_readable()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; once more does nothing."""
        self._file.close()

    @property
    def revision(self) -> int:
        """Grows with every entry made through this object, by :meth:`record`, :meth:`merge` or
        :meth:`repair`, once it is on the disk; costs nothing to ask."""
        return self._revision

    def record(self, entry: LedgerEntry, message: bytes | None = None) -> None:
        """Write ``entry`` durably, and with it the encoded release that is about to be sent.

        A participant has at most one unsent release in a study: a later one takes the place of its bytes.

        Args:
            entry: New.
            message: None for private steps that led to no release.

        Raises:
            LedgerWriteError: if it could not be written: then nothing may be sent.
            ConfigurationError: if the entry is in the ledger already.
        """
        with self._file.alone():
            with self._file.writing() as database:
                if _find(database, entry.id) is not None:
                    raise ConfigurationError(
                        f"the ledger holds entry {entry.id} already; every release is a new one"
                    )
                _insert(database, entry)
                if message is not None:
                    database.execute(
                        "INSERT OR REPLACE INTO unsent VALUES (?, ?, ?, ?)",
                        (entry.study, entry.participant, entry.id, message),
                    )
            self._revision += 1

    def sent(self, id: str) -> None:
        """Forget the bytes of entry ``id``: its receipt came, or it was given up for good."""
        with self._file.writing() as database:
            database.execute("DELETE FROM unsent WHERE id = ?", (id,))

    def pending(self, study: str, participant: str) -> Unsent | None:
        """What was recorded and perhaps not sent: these bytes, and no others, are to be sent again."""
        with self._file.reading() as database:
            row = database.execute(
                "SELECT id, message FROM unsent WHERE study = ? AND participant = ?", (study, participant)
            ).fetchone()
            if row is None:
                return None
            entry = _find(database, row[0])
        assert entry is not None  # one transaction wrote both
        return Unsent(entry, row[1])

    def entries(self) -> list[LedgerEntry]:
        """All entries, in the order of their time."""
        with self._file.reading() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY at, id").fetchall()
        return [_entry(row) for row in rows]

    def events(self) -> list[PrivacyEvent]:
        """What all of them cost, over every study and participant: input to the accounting."""
        with self._file.reading() as database:
            rows = database.execute(
                "SELECT event FROM entries WHERE event IS NOT NULL ORDER BY at, id"
            ).fetchall()
        return [_event(text) for (text,) in rows]

    def last_round(self, study: str, participant: str) -> int:
        """The last round of this participant in a study; 0 if there is none."""
        with self._file.reading() as database:
            row = database.execute(
                "SELECT MAX(round) FROM entries WHERE study = ? AND participant = ?", (study, participant)
            ).fetchone()
        return int(row[0] or 0)

    def merge(self, other: Ledger | str | Path | Iterable[LedgerEntry]) -> int:
        """Take in the entries of another ledger of the same data set, or of a checkpoint: the union by id.

        Bytes of unsent releases stay where they are.

        Returns:
            How many were new.

        Raises:
            ConfigurationError: if the two hold different entries under one id, or there is no such file.
        """
        if isinstance(other, str | Path):
            if not Path(other).is_file():
                raise ConfigurationError(f"there is no ledger {other} to merge")
            with Ledger(other) as opened:
                return self.merge(opened)
        theirs = other.entries() if isinstance(other, Ledger) else list(other)
        added = 0
        with self._file.alone():
            with self._file.writing() as database:
                for entry in theirs:
                    mine = _find(database, entry.id)
                    if mine is None:
                        _insert(database, entry)
                        added += 1
                    elif mine != entry:
                        raise ConfigurationError(
                            f"two ledgers hold different entries under the id {entry.id}: one was altered; "
                            f"nothing was merged"
                        )
            self._revision += added
        return added

    def _require_readable(self) -> None:
        # Before anything is spent: what cannot be accounted for must not be noticed after a release.
        with self._file.reading() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM entries").fetchall()
        for row in rows:
            try:
                _entry(row)
            except ConfigurationError as error:
                raise LedgerError(
                    f"{self.path}: entry {row[0]} cannot be read: {error}. If the ledger was altered, put "
                    f"its latest backup in its place and merge what checkpoints hold"
                ) from error

    def to_primitives(self) -> list[dict[str, Any]]:
        """All entries as strings and numbers, for a checkpoint; :meth:`merge_primitives` takes them in."""
        return [entry.to_primitives() for entry in self.entries()]

    def merge_primitives(self, entries: Iterable[dict[str, Any]]) -> int:
        """Take in what :meth:`to_primitives` gave: an older checkpoint adds nothing and removes nothing."""
        return self.merge([LedgerEntry.from_primitives(fields) for fields in entries])

    def require_not_behind(self, study: str, participant: str, last_round: int) -> None:
        """Raise LedgerBehindError if the server accepted a round that this ledger does not know.

        Args:
            last_round: The server's last receipt for this participant.
        """
        known = self.last_round(study, participant)
        if known < last_round:
            raise LedgerBehindError(
                f"the server has accepted round {last_round} of participant {participant!r} in study "
                f"{study!r}, and {self.path or 'the ledger in memory'} knows only of round {known}: it is "
                f"not the one that paid for it, or an older copy. Merge the right one (Ledger.merge), or "
                f"charge the missing rounds (Ledger.repair). Rounds that were made without a mechanism "
                f"cannot be charged: join under another participant name"
            )

    def repair(self, study: str, participant: str, last_round: int, event: PrivacyEvent) -> int:
        """Charge ``event`` for each round up to ``last_round`` that the ledger lacks: for one that is lost.

        Choose an event at least as costly as what these rounds really did; a run that also spent on
        rounds that never reached the server has spent more.

        Returns:
            How many rounds were charged.
        """
        with self._file.alone():
            missing = range(self.last_round(study, participant) + 1, last_round + 1)
            return self.merge([LedgerEntry.new(study, participant, round, event) for round in missing])

    def taint(self, participant: str, reason: str) -> None:
        """Mark this participant's parameters as trained without noise: no release may follow from them."""
        with self._file.writing() as database:
            database.execute("INSERT OR IGNORE INTO taints VALUES (?, ?)", (participant, reason))

    def tainted(self, participant: str) -> str | None:
        """Why this participant's parameters may not be released; None if they may."""
        with self._file.reading() as database:
            row = database.execute(
                "SELECT reason FROM taints WHERE participant = ?", (participant,)
            ).fetchone()
        return None if row is None else str(row[0])

    def clear_taint(self, participant: str) -> None:
        """Its parameters and its optimizer's state were set back to released ones."""
        with self._file.writing() as database:
            database.execute("DELETE FROM taints WHERE participant = ?", (participant,))


@lru_cache(maxsize=1024)  # events are frozen, and few differ
def _event(line: str) -> PrivacyEvent:
    return require_accountable(event_from_json(line))


def _find(database: sqlite3.Connection, id: str) -> LedgerEntry | None:
    row = database.execute(f"SELECT {_COLUMNS} FROM entries WHERE id = ?", (id,)).fetchone()
    return None if row is None else _entry(row)


def _insert(database: sqlite3.Connection, entry: LedgerEntry) -> None:
    values = entry.to_primitives().values()
    database.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(values))


def _entry(row: tuple[Any, ...]) -> LedgerEntry:
    return LedgerEntry.from_primitives(dict(zip(_COLUMNS.split(", "), row)))
