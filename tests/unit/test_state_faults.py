"""The state directory on a full disk, a damaged one, or one in use: it says so, and changes nothing."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from state_harness import Told, contents, entry, no_file_grows_beyond, opened

from lightning_ppdl.errors import ConfigurationError, StateError, StateLockedError, StateWriteError
from lightning_ppdl.server import blobs
from lightning_ppdl.server.journal import JournalEntry, Snapshot
from lightning_ppdl.server.state import FILE, StateDirectory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


# Full disks


def test_a_full_disk_changes_nothing_and_is_said(path: Path) -> None:
    with opened(path) as state:
        state.write(first := entry(1), lambda: None)
        grown = state.journal_bytes
        with no_file_grows_beyond((path / f"{FILE}-wal").stat().st_size):
            told = Told(2)
            for number in (2, 3):
                state.append(entry(number, 100_000), told)
            for problem in told.wait():
                assert isinstance(problem, StateWriteError)
                assert "nothing was changed; free space" in str(problem)
            with pytest.raises(StateWriteError):
                state.write(entry(2, 100_000), lambda: pytest.fail("it is not durable"))
            with pytest.raises(StateWriteError):
                state.put_member("anna", {"session": "x" * 100_000})
            with pytest.raises(StateWriteError):
                state.put_fact("fact", "x" * 100_000)
            assert contents(state) == [(first.message, first.accepted, first.turns)]
            assert (state.journal_bytes, state.members()) == (grown, {})
        state.write(entry(2, 100_000), lambda: None)
        assert [one.number for one in state.journal()] == [1, 2]


def test_a_snapshot_that_fails_leaves_the_journal_and_is_not_tried_at_every_upload(path: Path) -> None:
    with opened(path, compact_bytes=1000) as state:
        state.put_snapshot(before := Snapshot({"at": 0}, {"w": np.zeros(10)}))
        for number in range(1, 5):
            state.write(entry(number, 300), lambda: None)
        assert state.wants_snapshot
        full = no_file_grows_beyond((path / f"{FILE}-wal").stat().st_size)
        with full, pytest.raises(StateWriteError):
            state.put_snapshot(Snapshot({"at": 4}, {"w": np.zeros(10_000)}))
        assert not state.wants_snapshot
        kept = state.snapshot()
        assert kept is not None and kept.document == before.document and len(kept.arrays["w"]) == 10
        assert len(contents(state)) == 4
        for number in range(5, 9):
            state.write(entry(number, 300), lambda: None)
        assert state.wants_snapshot
        state.put_snapshot(Snapshot({"at": 8}, {"w": np.zeros(10)}))
        assert not state.wants_snapshot and contents(state) == []


def test_a_file_that_was_moved_away_takes_nothing_more(path: Path) -> None:
    with opened(path) as state:
        state.write(entry(1), lambda: None)
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(StateWriteError, match="moved or replaced"):
            state.write(entry(2), lambda: None)


# Files that cannot be used


def filled(path: Path) -> None:
    with opened(path) as state:
        state.put_snapshot(Snapshot({}, {"w": np.full(50_000, 0x5A5A5A5A, np.uint32)}))
        for _ in range(2):
            state.write(JournalEntry(b"\xa5" * 20_000, (), {}), lambda: None)


def put(path: Path, at: int, what: bytes) -> None:
    with (path / FILE).open("r+b") as file:
        file.seek(at)
        file.write(what)


@pytest.mark.parametrize("damage", ["text", "pages", "emptied by half"])
def test_a_damaged_file_is_not_taken_for_a_new_one(path: Path, damage: str) -> None:
    filled(path)
    if damage == "text":
        (path / FILE).write_text("no state at all\n" * 100)
    elif damage == "pages":
        put(path, 4096 + 8, b"\xff" * 20_000)
    else:
        os.truncate(path / FILE, (path / FILE).stat().st_size // 2)
    for _ in range(2):  # and holds no lock
        with pytest.raises(StateError, match=r"damaged or no state.*latest backup"):
            StateDirectory(path).open(lambda: None)


@pytest.mark.parametrize("value", [b"\x5a" * 64, b"\xa5" * 64])
def test_a_value_that_changed_on_the_disk_is_noticed(path: Path, value: bytes) -> None:
    """In the middle of a page that holds nothing else: SQLite itself does not see it."""
    filled(path)
    put(path, (path / FILE).read_bytes().index(value * 10) + 300, b"\x00")
    with opened(path) as state, pytest.raises(StateError, match=r"cannot be read: .* check sum"):
        print(state.snapshot(), list(state.journal()))


def test_a_missing_part_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "CHUNK_BYTES", 1000)
    filled(path)
    database = sqlite3.connect(path / FILE)
    database.execute("DELETE FROM arrays WHERE part = 7")
    database.commit()
    database.close()
    with opened(path) as state, pytest.raises(StateError, match="part of 'w' is missing"):
        state.snapshot()


def test_another_applications_file_and_a_later_version(path: Path) -> None:
    path.mkdir()
    with sqlite3.connect(path / FILE) as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    database.close()
    with pytest.raises(StateError, match="not a state"):
        StateDirectory(path).open(lambda: None)
    (path / FILE).unlink()
    with opened(path):
        pass
    database = sqlite3.connect(path / FILE)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StateError, match=r"later lightning_ppdl \(state version 99.*upgrade"):
        StateDirectory(path).open(lambda: None)


def test_one_server_at_a_time(path: Path) -> None:
    code = (
        "from lightning_ppdl.server.state import StateDirectory\n"
        f"StateDirectory({str(path)!r}).open(lambda: None)"
    )
    with opened(path):
        with pytest.raises(StateLockedError, match=rf"in use by process {os.getpid()}: one server at a time"):
            StateDirectory(path).open(lambda: None)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "StateLockedError" in result.stderr and f"process {os.getpid()}" in result.stderr
    with opened(path):
        pass


def test_what_can_be_no_directory(path: Path, tmp_path: Path) -> None:
    path.write_text("a file")
    for where in (path, path / "below"):
        with pytest.raises(ConfigurationError, match=r"cannot be made a directory.*another path"):
            StateDirectory(where).open(lambda: None)
    (tmp_path / "other" / FILE).mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="is a directory"):
        StateDirectory(tmp_path / "other").open(lambda: None)
    with pytest.raises(StateError, match="not open"):
        StateDirectory(path).members()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "quota is full"),
        (errno.EACCES, "no permission.*give the state another path"),
        (errno.EROFS, "is read-only"),
    ],
)
@pytest.mark.parametrize("of", [FILE, f"{FILE}.lock"])
def test_a_disk_that_refuses_is_not_called_a_damaged_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, of: str
) -> None:
    original = os.open

    def refusing(name: str | Path, *arguments: int) -> int:
        if Path(name).name == of:
            raise OSError(number, os.strerror(number), str(name))
        return original(name, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StateError, match=said) as error:
        StateDirectory(path).open(lambda: None)
    assert "backup" not in str(error.value)


def test_a_disk_that_takes_no_write_is_noticed_at_opening(path: Path) -> None:
    with opened(path):
        pass
    with no_file_grows_beyond(0), pytest.raises(StateError, match="free space") as error:
        StateDirectory(path).open(lambda: None)
    assert "backup" not in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes")
def test_only_its_owner_can_read_it(path: Path) -> None:
    before = os.umask(0o022)
    try:
        with opened(path) as state:
            state.put_member("anna", {"session": "secret"})
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) == {FILE, f"{FILE}.lock", f"{FILE}-wal"} and set(modes.values()) == {0o600}
    assert path.stat().st_mode & 0o777 == 0o700
