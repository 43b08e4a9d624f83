"""The ledger counts all that was sent, whatever happens to the process, the disk or the checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ppdl.errors import (
    ConfigurationError,
    LedgerBehindError,
    LedgerError,
    LedgerLockedError,
    LedgerWriteError,
)
from lightning_ppdl.privacy.accounting import total
from lightning_ppdl.privacy.events import GaussianRound, PrivateSteps, SparseVectorRound
from lightning_ppdl.privacy.ledger import Ledger, LedgerEntry

EVENT = SparseVectorRound(0.1, 10, size=1000, bound=0.001, threshold=0.0001, variant="paper")
EVENTS = [EVENT, GaussianRound(2.0, 1.0, 1000), PrivateSteps(1.44, 0.2, 1.0, steps=6), None]


def entry(round: int = 1, participant: str = "clinic-a", study: str = "s1") -> LedgerEntry:
    return LedgerEntry.new(study, participant, round, EVENT, released_values=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clinic-a.ledger"


# Record, send, settle


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_recorded_is_pending_until_it_was_sent(path: Path, durable: bool) -> None:
    with Ledger(path if durable else None) as ledger:
        assert ledger.pending("s1", "clinic-a") is None
        first = entry()
        ledger.record(first, b"release")
        unsent = ledger.pending("s1", "clinic-a")
        assert unsent is not None
        assert (unsent.entry, unsent.message) == (first, b"release")
        assert ledger.pending("s1", "clinic-b") is None and ledger.pending("s2", "clinic-a") is None
        ledger.sent(first.id)
        assert ledger.pending("s1", "clinic-a") is None
        assert ledger.entries() == [first]


def test_it_is_there_after_a_restart_with_every_kind_of_event(path: Path) -> None:
    entries = [LedgerEntry.new("s1", "clinic-a", round, event, round) for round, event in enumerate(EVENTS)]
    with Ledger(path) as ledger:
        for one in entries:
            ledger.record(one, str(one.round).encode())
    with Ledger(path) as ledger:
        assert sorted(ledger.entries(), key=lambda one: one.round) == entries
        assert set(ledger.events()) == set(EVENTS) - {None}
        unsent = ledger.pending("s1", "clinic-a")
        assert unsent is not None and unsent.message == b"3"  # the last release's bytes


def test_one_ledger_counts_all_studies_and_participants(path: Path) -> None:
    with Ledger(path) as ledger:
        for study in ("s1", "s2"):
            for participant in ("clinic-a", "clinic-b"):
                for round in (1, 2):
                    ledger.record(entry(round, participant, study), b"")
        ledger.record(LedgerEntry.new("s2", "clinic-a", 3, EVENT))  # steps that were never released
        assert total(ledger.events(), 0.0).epsilon == pytest.approx(0.9)
        assert ledger.last_round("s2", "clinic-a") == 3
        assert ledger.last_round("s3", "clinic-a") == 0


def test_an_entry_is_recorded_once(path: Path) -> None:
    with Ledger(path) as ledger:
        one = entry()
        ledger.record(one, b"first")
        with pytest.raises(ConfigurationError, match="a new one"):
            ledger.record(one, b"second")
        unsent = ledger.pending("s1", "clinic-a")
        assert unsent is not None and unsent.message == b"first"
        assert len(ledger.events()) == 1


# Killed at any instant

CHILD = """
import os, sys
from pathlib import Path
from lightning_ppdl.privacy.events import SparseVectorRound
from lightning_ppdl.privacy.ledger import Ledger, LedgerEntry
EVENT = SparseVectorRound(0.1, 10, size=1000, bound=0.001, threshold=0.0001, variant="paper")
ledger, server = Ledger(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def send(entry, message):
    os.write(server, f"\\n{entry.round} {entry.id} {message.hex()}\\n".encode())
    os.fsync(server)
    ledger.sent(entry.id)

print("ready", flush=True)
unsent = ledger.pending("s1", "clinic-a")
if unsent:
    send(unsent.entry, unsent.message)
while True:
    entry = LedgerEntry.new("s1", "clinic-a", ledger.last_round("s1", "clinic-a") + 1, EVENT, 1)
    message = os.urandom(2000)
    ledger.record(entry, message)
    send(entry, message)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_any_instant_nothing_that_was_sent_is_uncounted(path: Path, tmp_path: Path) -> None:
    server, instants = tmp_path / "server", random.Random(0)
    for _ in range(10):
        command = [sys.executable, "-c", CHILD, str(path), str(server)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(instants.uniform(0, 0.08))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
    received: dict[str, tuple[int, str]] = {}
    torn: set[str] = set()
    for line in server.read_text().splitlines():
        round, id, message = (*line.split(), "", "", "")[:3]
        if len(message) == 4000:
            sent = (int(round), message)
            assert received.setdefault(id, sent) == sent  # only ever the same bytes
        elif len(id) == 32:
            torn.add(id)  # killed within the write
    with Ledger(path) as ledger:
        counted = {one.id: one.round for one in ledger.entries()}
        unsent = ledger.pending("s1", "clinic-a")
    assert len(received) > 10
    assert set(received) | torn <= set(counted)
    assert sorted(counted.values()) == list(range(1, len(counted) + 1))  # each round once
    never_sent = set(counted) - set(received)
    assert never_sent <= ({unsent.entry.id} if unsent else set())


# The lock


def test_a_second_run_is_told_who_holds_the_ledger(path: Path, tmp_path: Path) -> None:
    other_name = tmp_path / "same.ledger"
    with Ledger(path):
        other_name.symlink_to(path)
        for name in (path, other_name):
            with pytest.raises(LedgerLockedError, match=rf"{path.name} is in use by process {os.getpid()}"):
                Ledger(name)
            code = f"from lightning_ppdl.privacy.ledger import Ledger; Ledger({str(name)!r})"
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert f"in use by process {os.getpid()}" in result.stderr
    Ledger(path).close()


def test_a_forked_child_neither_keeps_the_lock_nor_writes(path: Path) -> None:
    ledger = Ledger(path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        try:
            ledger.record(entry())
            os._exit(1)
        except LedgerError:
            os.read(read, 1)  # outlives the parent's ledger
            os._exit(0)
    os.close(read)
    ledger.record(entry())
    with pytest.raises(LedgerLockedError):
        Ledger(path)
    ledger.close()
    Ledger(path).close()
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Disks


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_changes_nothing_and_says_so(path: Path) -> None:
    with Ledger(path) as ledger:
        first, second = entry(1), entry(2)
        ledger.record(first, b"first")
        with no_file_grows_beyond(path.stat().st_size + 4096):
            with pytest.raises(LedgerWriteError, match=r"nothing may be sent; free space"):
                ledger.record(second, os.urandom(200_000))
            unsent = ledger.pending("s1", "clinic-a")
            assert unsent is not None and unsent.message == b"first"
        assert ledger.entries() == [first]
        ledger.record(second, os.urandom(200_000))  # there is room again
    with Ledger(path) as ledger:
        assert ledger.entries() == [first, second]


def test_a_file_that_was_moved_away_takes_no_more_entries(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.record(entry())
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(LedgerWriteError, match="moved or replaced"):
            ledger.record(entry(2))


@pytest.mark.parametrize("damage", ["text", "middle", "other"])
def test_a_damaged_file_is_not_taken_for_an_empty_one(path: Path, damage: str) -> None:
    if damage == "text":
        path.write_text("no ledger at all\n" * 100)
    elif damage == "other":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE songs (name TEXT)")
        database.close()
    else:
        with Ledger(path) as ledger:
            for round in range(1, 300):
                ledger.record(entry(round))
        with path.open("r+b") as file:
            file.seek(4096 + 8)
            file.write(b"\xff" * 20_000)
    with pytest.raises(LedgerError, match=f"{path.name}.* ledger"):
        Ledger(path)


def test_a_later_version_is_refused(path: Path) -> None:
    Ledger(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(LedgerError, match=r"version 99.*upgrade"):
        Ledger(path)


def test_a_missing_directory_and_a_closed_ledger(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no directory"):
        Ledger(path.parent / "nowhere" / "x.ledger")
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="was closed"):
        ledger.events()


# Union

POOL = [LedgerEntry(f"{n:032x}", "s1", "clinic-a", n, EVENTS[n % 4], n, float(n)) for n in range(8)]
subsets = st.lists(st.sampled_from(POOL), unique_by=lambda one: one.id)


def union(*parts: list[LedgerEntry]) -> list[LedgerEntry]:
    with Ledger(None) as ledger:
        for part in parts:
            ledger.merge(part)
        return ledger.entries()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(a=subsets, b=subsets, c=subsets)
def test_merging_is_a_union(a: list[LedgerEntry], b: list[LedgerEntry], c: list[LedgerEntry]) -> None:
    assert union(a, a) == union(a) == sorted(a, key=lambda one: one.at)
    assert union(a, b) == union(b, a)
    assert union(union(a, b), c) == union(a, union(b, c))
    assert set(union(a, b)) == set(a) | set(b)


def test_an_older_checkpoint_rolls_nothing_back(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.record(entry(1))
        checkpoint = json.loads(json.dumps(ledger.to_primitives()))
        ledger.record(entry(2), b"second")
        before = ledger.entries()
        assert ledger.merge_primitives(checkpoint) == 0
        assert ledger.entries() == before
        assert ledger.pending("s1", "clinic-a") is not None
    with Ledger(None) as fresh:
        assert fresh.merge_primitives(checkpoint) == 1
        assert fresh.entries() == before[:1]


def test_merging_a_file(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.record(entry(1), b"bytes")
    with Ledger(tmp_path / "other.ledger") as other:
        assert (other.merge(path), other.merge(str(path))) == (1, 0)
        assert other.pending("s1", "clinic-a") is None  # its machine's affair
        with pytest.raises(ConfigurationError, match="no ledger"):
            other.merge(tmp_path / "missing")
        assert not (tmp_path / "missing").exists()


def test_an_altered_entry_is_noticed_and_nothing_merged() -> None:
    with Ledger(None) as ledger:
        one = entry()
        ledger.record(one)
        altered = LedgerEntry(one.id, one.study, one.participant, one.round, None, 0, one.at)
        with pytest.raises(ConfigurationError, match=one.id):
            ledger.merge([entry(2), altered])
        assert ledger.entries() == [one]


# Behind the server


def test_a_ledger_behind_the_server_is_refused_until_repaired(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.record(entry(1))
        ledger.require_not_behind("s1", "clinic-a", 1)
        ledger.require_not_behind("s1", "clinic-a", 0)
        with pytest.raises(
            LedgerBehindError,
            match=r"round 4 .*'clinic-a'.* of round 1.*merge.*repair.*another participant name",
        ):
            ledger.require_not_behind("s1", "clinic-a", 4)
        assert ledger.repair("s1", "clinic-a", 4, GaussianRound(1.0, 1.0, 10)) == 3
        ledger.require_not_behind("s1", "clinic-a", 4)
        assert len(ledger.events()) == 4
        assert ledger.repair("s1", "clinic-a", 4, EVENT) == 0


def test_a_taint_stays_until_it_is_cleared(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger.tainted("clinic-a") is None
        ledger.taint("clinic-a", "fit() without privacy")
        ledger.taint("clinic-a", "again")
    with Ledger(path) as ledger:
        assert ledger.tainted("clinic-a") == "fit() without privacy"
        assert ledger.tainted("clinic-b") is None
        ledger.clear_taint("clinic-a")
        assert ledger.tainted("clinic-a") is None


# Noticed at opening


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"epsilon"', '"epsilom"', "epsilom is unknown, epsilon is missing"),
        ('"epsilon": 0.1', '"epsilon": "0.1"', "epsilon='0.1' is no float"),
        ('"epsilon": 0.1', '"epsilon": -0.1', "epsilon=-0.1 must be"),
        ('"epsilon": 0.1', '"epsilon": NaN', "epsilon=nan must be"),
        ('"sparse_vector"', '"novel"', "'novel' event"),
        ("{", "", "describes no private release"),
    ],
)
def test_an_altered_event_is_noticed_before_anything_is_spent(
    path: Path, old: str, new: str, said: str
) -> None:
    one = entry()
    with Ledger(path) as ledger:
        ledger.record(entry(2))
        ledger.record(one)
    database = sqlite3.connect(path)
    database.execute("UPDATE entries SET event = replace(event, ?, ?) WHERE id = ?", (old, new, one.id))
    database.commit()
    database.close()
    with pytest.raises(LedgerError) as error:
        Ledger(path)
    assert f"entry {one.id}" in str(error.value) and said in str(error.value)
    with pytest.raises(LedgerError, match="cannot be read"):  # and the lock is free again
        Ledger(path)


def test_a_checkpoint_that_holds_no_entries() -> None:
    with Ledger(None) as ledger:
        for fields in ({}, {**entry().to_primitives(), "more": 1}, {**entry().to_primitives(), "at": "now"}):
            with pytest.raises(ConfigurationError):
                ledger.merge_primitives([fields])


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes")
def test_only_its_owner_can_read_it(path: Path) -> None:
    before = os.umask(0o022)
    try:
        with Ledger(path) as ledger:
            ledger.record(entry(), b"secret")
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert {path.name, path.name + ".lock"} <= set(modes)
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "quota is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "is read-only"),
    ],
)
@pytest.mark.parametrize("of", ["clinic-a.ledger", "clinic-a.ledger.lock"])
def test_a_disk_that_refuses_is_not_called_a_damaged_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, of: str
) -> None:
    original = os.open

    def refusing(name: str | Path, *arguments: int) -> int:
        if Path(name).name == of:
            raise OSError(number, os.strerror(number), str(name))
        return original(name, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(LedgerError, match=said) as error:
        Ledger(path)
    assert "backup" not in str(error.value) and of in str(error.value)


def test_a_disk_that_takes_no_write_is_noticed_at_opening(path: Path) -> None:
    Ledger(path).close()
    with no_file_grows_beyond(0), pytest.raises(LedgerError, match="free space") as error:
        Ledger(path)
    assert "backup" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_is_noticed_at_opening(path: Path) -> None:
    Ledger(path).close()
    path.chmod(0o400)
    with pytest.raises(LedgerError, match="no permission"):
        Ledger(path)


def test_a_second_name_of_an_open_ledger_is_in_use(path: Path) -> None:
    other = path.with_name("other-name.ledger")
    with Ledger(path):
        os.link(path, other)
        with pytest.raises(LedgerLockedError, match="under another name"):
            Ledger(other)


def test_a_directory_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a directory"):
        Ledger(tmp_path)


# Shared in one process


def test_the_revision_grows_with_every_entry_and_with_nothing_else(path: Path) -> None:
    with Ledger(path) as ledger:
        seen = [ledger.revision]
        one = entry(1)
        ledger.record(one, b"bytes")
        seen.append(ledger.revision)
        ledger.merge([entry(2), entry(3)])
        seen.append(ledger.revision)
        ledger.repair("s1", "clinic-a", 5, EVENT)
        seen.append(ledger.revision)
        assert sorted(set(seen)) == seen
        ledger.merge([one])
        ledger.sent(one.id)
        ledger.entries()
        with pytest.raises(ConfigurationError):
            ledger.record(one)
        altered = LedgerEntry(one.id, one.study, one.participant, one.round, None, 0, one.at)
        with pytest.raises(ConfigurationError):
            ledger.merge([entry(9), altered])
        with no_file_grows_beyond(0), pytest.raises(LedgerWriteError):
            ledger.record(entry(6), os.urandom(200_000))
        assert ledger.revision == seen[-1]


def test_threads_share_an_open_ledger(path: Path) -> None:
    with Ledger(path) as ledger:

        def spend(participant: str) -> None:
            for round in range(1, 21):
                ledger.record(entry(round, participant), b"bytes")
                assert ledger.last_round("s1", participant) == round
                ledger.repair("s1", "both", round, EVENT)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(spend, "abcd"))
        assert ledger.revision == len(ledger.entries()) == 4 * 20 + 20
