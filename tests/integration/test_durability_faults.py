"""A server whose disk is full, or whose merge rule raises."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from durable_harness import MANIFEST, SIZE, everything, flush, joined, message, no_file_grows_beyond, serving

from lightning_ppdl import MergeRule, RoundRobin, Synchronous, wire
from lightning_ppdl.errors import (
    FingerprintMismatchError,
    PPDLError,
    StateError,
    StateWriteError,
)
from lightning_ppdl.records import Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.server.merge import MergeContext
from lightning_ppdl.server.state import FILE, StateDirectory
from lightning_ppdl.server.store import Change


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """What hangs is shown, and does not keep the other tests from running."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def written(path: Path) -> int:
    return (path / f"{FILE}-wal").stat().st_size


# Full disks


def test_uploads_go_on_once_there_is_room(path: Path) -> None:
    server = serving(path)
    anna, ben = joined(server, "anna"), joined(server, "ben")
    server.upload(anna, message("anna"))
    flush(server)
    before = everything(server)
    with no_file_grows_beyond(written(path)):
        for _ in range(3):
            for session, upload in ((anna, message("anna", 2)), (ben, message("ben"))):
                with pytest.raises(StateWriteError, match=r"nothing was changed; free space"):
                    server.upload(session, upload)
        assert everything(server) == before
    assert server.upload(anna, message("anna", 2)).version == 2
    assert server.upload(ben, message("ben")).version == 3
    after = everything(server)
    server.close()
    server = serving(path)
    assert everything(server) == after
    server.close()


def test_a_turn_survives_an_upload_that_could_not_be_written(path: Path) -> None:
    server = serving(path, protocol=RoundRobin())
    anna, ben = joined(server, "anna"), joined(server, "ben")
    assert server.take_turn(anna)
    flush(server)
    with no_file_grows_beyond(written(path)):
        with pytest.raises(StateWriteError):
            server.upload(anna, message("anna"))
        assert not server.take_turn(ben)
        server.end_turn(anna)  # is not noted on the disk
        assert server.take_turn(ben)
    server.renew_turn(ben)  # now it is
    server.close()
    server = serving(path, protocol=RoundRobin())
    server.upload(ben, message("ben"))
    server.close()


def test_joining_and_offering_fail_cleanly(path: Path) -> None:
    server = serving(path)
    other = Manifest((ParameterSpec("v", (3,), "float32"),))
    with no_file_grows_beyond(written(path)):
        with pytest.raises(StateWriteError):
            server.join("anna", other)  # binds nobody to what it declared
        assert server.status().members == ()
    anna = server.join("anna", MANIFEST).session
    start = np.ones(SIZE, np.float32)
    with no_file_grows_beyond(written(path)):
        with pytest.raises(StateWriteError):
            server.offer_initial(anna, start)
        with pytest.raises(PPDLError, match="no parameters yet"):
            server.upload(anna, message("anna"))
    assert server.offer_initial(anna, start)
    with no_file_grows_beyond(written(path)):
        with pytest.raises(StateWriteError):
            server.join("anna", MANIFEST)
        with pytest.raises(StateWriteError):
            server.join("ben", MANIFEST)
        assert [member.name for member in server.status().members] == ["anna"]
        assert server.participant(anna) == "anna"  # its session is not over
        server.leave(anna)
        assert not server.status().members[0].present
    server.close()
    server = serving(path)
    assert [member.name for member in server.status().members] == ["anna"]
    with pytest.raises(FingerprintMismatchError):
        server.join("cleo", other)
    server.close()


def test_a_server_with_parameters_of_its_own_is_not_begun_by_a_join_that_failed(path: Path) -> None:
    server = serving(path, initial=np.ones(SIZE, np.float32))
    with no_file_grows_beyond(written(path)), pytest.raises(StateWriteError):
        server.join("anna", MANIFEST)
    server.close()
    server = serving(path, initial=np.full(SIZE, 2, np.float32))
    assert server.status().members == ()
    server.join("ben", MANIFEST)
    assert server.parameters()[0] == 2
    server.close()


def test_a_cycle_that_cannot_be_written_is_lost_and_the_next_one_is_not(path: Path) -> None:
    server = serving(path, protocol=Synchronous())
    sessions = {name: joined(server, name) for name in ("anna", "ben")}
    for round_, room in ((1, 0), (2, 2**30)):
        for session in sessions.values():
            assert server.take_turn(session)
        flush(server)
        with no_file_grows_beyond(written(path) + room):
            for name, session in sessions.items():
                assert server.upload(session, message(name, round_)).version == 1
    assert server.version == 1
    before = everything(server)
    server.close()
    server = serving(path, protocol=Synchronous())
    assert everything(server) == before
    server.close()


def test_a_snapshot_that_finds_no_room_costs_nothing_but_the_journals_growth(path: Path) -> None:
    server = serving(path, state=StateDirectory(path, compact_bytes=2000))
    anna = joined(server, "anna")
    state = server._state
    assert state is not None
    with pytest.MonkeyPatch.context() as patch:
        tries = []

        def refuse(snapshot: object) -> None:
            tries.append(state.journal_bytes)
            state._snapshot_failed_at = state.journal_bytes
            raise StateWriteError("no room")

        patch.setattr(state, "put_snapshot", refuse)
        for round_ in range(1, 41):
            server.upload(anna, message("anna", round_, round_ - 1, seed=round_))
        flush(server)
    assert 2 <= len(tries) <= 12
    grown = state.journal_bytes
    server.upload(anna, message("anna", 41, 40))
    server.upload(anna, message("anna", 42, 41))
    for round_ in range(43, 60):
        server.upload(anna, message("anna", round_, round_ - 1, seed=round_))
    flush(server)
    assert state.journal_bytes < grown
    before = everything(server)
    server.close()
    server = serving(path)
    assert everything(server) == before
    server.close()


# Merge rules that raise


class Moody(MergeRule):
    """Adds, but not what begins with a value above 1; counts what it saw."""

    def __init__(self, error: type[Exception] = ValueError) -> None:
        self.error = error
        self.seen = np.zeros(1)

    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        self.seen += 1
        if len(update.values) and update.values[0] > 1:
            raise self.error("not in the mood")
        return Change(update.indices, update.values)

    def state(self) -> dict[str, np.ndarray]:
        return {"seen": self.seen}

    def restore(self, state: object) -> None:
        self.seen = np.array(state["seen"])  # type: ignore[index]


def value(name: str, round_: int, base: int, amount: float) -> bytes:
    update = SparseUpdate(name, round_, base, np.array([3]), np.array([amount], np.float32))
    return wire.encode_update(update, SIZE)


@pytest.mark.parametrize("compact_bytes", [1, 2**26])
@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_what_a_rule_refuses_is_passed_over_at_every_restart(
    path: Path, error: type[Exception], compact_bytes: int
) -> None:
    server = serving(path, merge=Moody(error), state=StateDirectory(path, compact_bytes))
    anna, ben = joined(server, "anna"), joined(server, "ben")
    server.upload(ben, value("ben", 1, 0, 0.5))
    with pytest.raises(error):
        server.upload(anna, value("anna", 1, 0, 2.0))
    assert server.upload(anna, value("anna", 1, 1, 0.25)).version == 2  # its round is free
    with pytest.raises(error):
        server.upload(ben, value("ben", 2, 0, 3.0))
    server.upload(ben, value("ben", 2, 2, 1.0))
    flush(server)
    for life in range(4):
        before = everything(server)
        server.close()
        server = serving(path, merge=Moody(error), state=StateDirectory(path, compact_bytes))
        assert everything(server) == before
        assert server.upload(anna, value("anna", 1, 1, 0.25)).version == 2
        server.upload(ben, value("ben", 3 + life, 3, 0.0))
    assert server.parameters()[3] == 1.75
    server.close()


def test_the_turn_stays_with_whoever_s_upload_the_rule_refused(path: Path) -> None:
    server = serving(path, merge=Moody(), protocol=RoundRobin())
    anna, ben = joined(server, "anna"), joined(server, "ben")
    assert server.take_turn(anna)
    with pytest.raises(ValueError, match="mood"):
        server.upload(anna, value("anna", 1, 0, 2.0))
    for _ in range(2):
        server.close()
        server = serving(path, merge=Moody(), protocol=RoundRobin())
        assert not server.take_turn(ben)
    server.upload(anna, value("anna", 1, 0, 1.0))
    assert server.take_turn(ben)
    server.close()


@pytest.mark.parametrize("uploads", [1, 3])
def test_a_rule_that_was_altered_takes_no_receipt_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, uploads: int
) -> None:
    server = serving(path, merge=Moody())
    anna = joined(server, "anna")
    for round_ in range(1, uploads + 1):
        server.upload(anna, value("anna", round_, round_ - 1, 1.0))
    server.close()
    with monkeypatch.context() as patch:
        patch.setattr(Moody, "merge", lambda *arguments: 1 / 0)
        for _ in range(2):
            with pytest.raises(StateError, match=r"entry 1 .*was merged before and cannot be now \(ZeroDiv"):
                serving(path, merge=Moody())
    server = serving(path, merge=Moody())
    assert server.version == uploads
    server.close()
