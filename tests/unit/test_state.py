"""The state directory: what was written is there again, whole and in order, and writes are shared."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from state_harness import Told, contents, entry, opened

from lightning_ppdl.errors import StateError
from lightning_ppdl.server import blobs
from lightning_ppdl.server.group_commit import GroupCommit
from lightning_ppdl.server.journal import JournalEntry, Snapshot
from lightning_ppdl.server.state import StateDirectory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


# What is written is there again


ARRAYS = {
    "parameters": np.arange(1000, dtype=np.float32),
    "matrix": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "every second": np.arange(20, dtype=np.uint32)[::2],
    "flags": np.array([True, False, True]),
    "number": np.array(7),
    "half": np.array(0.5, np.float16),
    "nothing": np.zeros(0, np.float32),
    "nothing, twice": np.zeros((3, 0), np.int64),
    "word": np.array("adam"),
    "big endian": np.arange(3, dtype=">i4"),
}


@pytest.mark.parametrize("chunk_bytes", [1, 7, 4000, 4001, 2**26])
def test_arrays_of_any_kind_in_parts_of_any_size(
    path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(blobs, "CHUNK_BYTES", chunk_bytes)
    document = {"version": 3, "increment": 1 / 3, "names": ["ä", '"'], "none": None}
    with opened(path) as state:
        assert state.snapshot() is None
        state.put_snapshot(Snapshot({}, {"longer": np.zeros(5000)}))
        state.put_snapshot(Snapshot(document, ARRAYS))
    with opened(path) as state:
        read = state.snapshot()
    assert read is not None and read.document == document
    assert set(read.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert read.arrays[name].dtype == array.dtype and read.arrays[name].shape == array.shape
        np.testing.assert_array_equal(read.arrays[name], array)
        read.arrays[name].flags.writeable = True  # its own memory


def test_entries_facts_and_members_in_their_order(path: Path) -> None:
    entries = [entry(number) for number in range(1, 6)]
    with opened(path) as state:
        for name in ("zoe", "anna", "ben"):
            state.put_member(name, {"session": name})
        state.put_member("anna", {"session": "again"})
        for one in entries[:3]:
            state.write(one, lambda: None)
        told = Told(2)
        for one in entries[3:]:
            state.append(one, told)
        assert told.wait() == [None, None]
    with opened(path) as state:
        assert list(state.members().items()) == [
            ("zoe", {"session": "zoe"}),
            ("anna", {"session": "again"}),
            ("ben", {"session": "ben"}),
        ]
        assert contents(state) == [(one.message, one.accepted, one.turns) for one in entries]
        assert [one.number for one in state.journal()] == [1, 2, 3, 4, 5]
        assert state.journal_bytes > sum(len(one.message) for one in entries)
        state.put_snapshot(Snapshot({"at": 5}, {}))
        assert (contents(state), state.journal_bytes) == ([], 0)
        state.write(six := entry(6), lambda: None)
    with opened(path) as state:
        assert contents(state) == [(six.message, six.accepted, six.turns)]
        assert state.fact("unknown") is None


def test_closing_writes_what_was_appended_and_may_be_repeated(path: Path) -> None:
    state = StateDirectory(path)
    state.open(lambda: None)
    told = Told(200)
    for number in range(1, 201):
        state.append(entry(number), told)
    state.note("last", "noted", told)
    state.close()
    state.close()
    assert told.problems == [None] * 201
    for _ in range(2):
        with pytest.raises(StateError, match="not open"):
            state.append(entry(), told)
    with opened(path) as again:
        assert len(contents(again)) == 200 and again.fact("last") == "noted"
    state.open(lambda: None)  # the same object once more
    state.append(entry(201), told)
    state.close()
    assert len(told.problems) == 202


# Group commit


def test_uploads_that_come_together_share_commits(path: Path) -> None:
    with opened(path) as state:
        commits: list[str] = []
        assert state._file is not None and state._file._database is not None
        state._file._database.set_trace_callback(
            lambda statement: commits.append(statement) if statement == "COMMIT" else None
        )
        gate, told = threading.Event(), Told(101)
        state.append(entry(1), lambda problem: gate.wait(30) and told(problem))
        while len(commits) < 1:
            pass
        entries = [entry(number) for number in range(2, 102)]
        for one in entries:  # while the writer is busy
            state.append(one, told)
        gate.set()
        assert told.wait() == [None] * 101
        assert len(commits) == 3  # 1 + 64 + 36
        assert [one[0] for one in contents(state)[1:]] == [one.message for one in entries]
        writes: dict[int, list[int]] = {}
        with state._file.reading() as database:
            for number, write in database.execute("SELECT number, write FROM journal"):
                writes.setdefault(write, []).append(number)
    assert list(writes.values()) == [[1], [*range(2, 66)], [*range(66, 102)]]


def test_one_waiter_that_fails_holds_nobody_up() -> None:
    unused: list[int] = []
    group = GroupCommit[int](lambda items: None, unused.extend)
    told = Told(2)
    group.add(1, lambda problem: bool(1 / 0))
    group.add(2, told)
    group.add(3, lambda problem: False)
    group.add(4, told)
    group.close()
    assert told.problems == [None, None] and unused == [1, 3]


def test_whoever_waits_learns_of_any_failure_and_what_comes_after_is_written() -> None:
    written: list[int] = []

    def commit(items: list[int]) -> None:
        if 1 in items:
            raise ZeroDivisionError
        written.extend(items)

    def after(unused: list[int]) -> None:
        raise KeyError

    group = GroupCommit[int](commit, after)
    first, later = Told(1), Told(2)
    group.add(1, first)
    assert isinstance(first.wait()[0], ZeroDivisionError)
    for item in (2, 3):
        group.add(item, later)
    assert later.wait() == [None, None]
    group.close()
    assert written == [2, 3]


def test_what_cannot_be_encoded_is_its_appenders_problem_alone(path: Path) -> None:
    with opened(path) as state:
        told = Told(1)
        with pytest.raises(TypeError):
            state.append(JournalEntry(b"", (), {"not": {"JSON"}}), told)
        state.append(entry(), told)
        assert told.wait() == [None]


def test_closing_from_within_an_answer_ends_the_thread(path: Path) -> None:
    state = StateDirectory(path)
    state.open(lambda: None)
    closed, told = threading.Event(), Told(0)

    def then(problem: Exception | None) -> bool:
        state.close()
        closed.set()
        return True

    state.append(entry(), then)
    assert closed.wait(30)
    with opened(path) as again:
        assert len(contents(again)) == 1
    assert told.problems == []


# Failed merges


def fail() -> None:
    raise ZeroDivisionError


def test_a_failed_merge_is_marked_with_the_next_write_at_the_latest(path: Path) -> None:
    with opened(path) as state:
        told = Told(1)
        state.append(entry(1), lambda problem: False)
        state.append(entry(2), told)
        told.wait()
        with pytest.raises(ZeroDivisionError):
            state.write(entry(3), fail)
        state.write(entry(4), lambda: None)
    with opened(path) as state:
        assert [one.failed for one in state.journal()] == [True, False, True, False]
        assert not any(one.last for one in state.journal())  # it was closed, so all is known
        state.write(entry(5), lambda: None)
        assert [one.last for one in state.journal()] == [False, False, False, False, True]
    with opened(path) as state:
        state.put_snapshot(Snapshot({}, {}))
    with opened(path) as state:
        state.write(entry(1), lambda: None)
        assert [one.last for one in state.journal()] == [True]
