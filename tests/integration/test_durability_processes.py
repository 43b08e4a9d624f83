"""A server that is killed at any instant, or asked many things at once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from durable_harness import MANIFEST, SIZE, everything, joined, message, serving
from killed_server import ENTRIES, upload_for_ever

from lightning_ppdl import RoundRobin, Synchronous
from lightning_ppdl.errors import LimitExceededError, PPDLError, ServerClosedError
from lightning_ppdl.records import Receipt
from lightning_ppdl.server.state import StateDirectory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """What hangs is shown, and does not keep the other tests from running."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# Killed at any instant


def test_killed_at_any_instant_every_receipt_is_kept_and_nothing_else_is_merged(
    path: Path, tmp_path: Path
) -> None:
    threads, instants, told = 6, random.Random(0), tmp_path / "told"
    context = multiprocessing.get_context("forkserver")  # which imports once
    context.set_forkserver_preload(["lightning_ppdl.server.core"])
    acked: dict[tuple[int, int], int] = {}
    for _ in range(12):
        told.write_bytes(b"")
        child = context.Process(target=upload_for_ever, args=(path, threads, told))
        child.start()
        while not told.stat().st_size:
            assert child.is_alive()
        time.sleep(instants.uniform(0, 0.15))
        child.kill()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        sent: dict[int, int] = {}
        for line in told.read_text().splitlines():
            what, participant, round_, version = line.split()[0], *map(int, line.split()[1:])
            if what == "acked":
                assert (participant, round_) not in acked
                acked[participant, round_] = version
            else:
                sent[participant] = round_
        server = serving(path)
        rounds = {int(member.name[1:]): member.rounds for member in server.status().members}
        expected = np.zeros((threads, ENTRIES), np.float32)
        for participant, merged in rounds.items():
            receipts = [round_ for one, round_ in acked if one == participant]
            assert max(receipts, default=0) <= merged <= sent.get(participant, merged)
            for round_ in range(1, merged + 1):
                expected[participant, round_ % ENTRIES] += round_
        np.testing.assert_array_equal(server.parameters().reshape(threads, ENTRIES), expected)
        assert server.version == sum(rounds.values()) == server.status().uploads
        server.close()
    versions = list(acked.values())
    assert len(versions) == len(set(versions)) > 100


# Many at once


def test_while_an_upload_is_on_its_way_its_bytes_get_its_receipt_and_others_are_refused(path: Path) -> None:
    server = serving(path)
    anna = joined(server, "anna")
    with server.changed:  # so nothing is answered meanwhile
        first, again = server.submit(anna, message("anna")), server.submit(anna, message("anna"))
        for other in (message("anna", seed=1), message("anna", 2)):
            with pytest.raises(LimitExceededError, match="one round at a time"):
                server.submit(anna, other)
        assert not first.cancel()  # whoever gives up does not take it from the others
        anna_again = server.join("anna", MANIFEST).session
        after_joining = server.submit(anna_again, message("anna"))
    assert first.result(30) == again.result(30) == after_joining.result(30)
    assert server.version == 1
    server.close()


def test_receipts_come_in_the_order_of_the_journal(path: Path) -> None:
    server = serving(path)
    names = [f"p{number}" for number in range(12)]
    sessions = {name: joined(server, name) for name in names}
    receipts: dict[int, tuple[str, int]] = {}

    def work(name: str) -> None:
        for round_ in range(1, 31):
            receipt = server.upload(sessions[name], message(name, round_, seed=round_))
            receipts[receipt.version] = name, round_

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(work, names))
    assert sorted(receipts) == list(range(1, 361))
    assert server._state is not None
    journal = [entry.accepted[0] for entry in server._state.journal()]
    assert [(one.participant, one.round) for one in journal] == [receipts[v] for v in sorted(receipts)]
    before = everything(server)
    server.close()
    server = serving(path)
    assert everything(server) == before
    server.close()


@pytest.mark.parametrize("protocol", [None, RoundRobin(), Synchronous()])
def test_nothing_deadlocks_when_all_is_asked_at_once(path: Path, protocol: RoundRobin | None) -> None:
    for life in range(3):
        server = serving(
            path, protocol=protocol, lease_seconds=0.05, state=StateDirectory(path, compact_bytes=1500)
        )
        stop = threading.Event()
        answers: list[Future[Receipt]] = []

        def work(name: str, server=server, stop=stop, answers=answers) -> None:  # type: ignore[no-untyped-def]
            chance = random.Random(name)
            session, round_ = "", 0
            while not stop.is_set():
                try:
                    if not session or chance.random() < 0.05:
                        membership = server.join(name, MANIFEST)
                        session, round_ = membership.session, membership.last_round
                        if membership.needs_initial:
                            server.offer_initial(session, np.zeros(SIZE, np.float32))
                    if chance.random() < 0.05:
                        server.leave(session)
                        session = ""
                    elif server.take_turn(session):
                        base = server.version
                        answers.append(answer := server.submit(session, message(name, round_ + 1, base)))
                        answer.result(60)
                        round_ += 1
                    elif chance.random() < 0.3:
                        server.status()
                        server.observe()
                except ServerClosedError:
                    return
                except PPDLError:
                    pass

        with ThreadPoolExecutor(12) as pool:
            done = [pool.submit(work, f"p{number}") for number in range(10)]
            time.sleep(0.6)
            closing = [pool.submit(server.close) for _ in range(2)]
            for one in closing:
                one.result(60)
            stop.set()
            for one in done:
                one.result(60)
        assert answers and all(answer.done() for answer in answers)
        before = everything(server)
        server = serving(path, protocol=protocol)
        after = everything(server)
        same = ("numbers", "arrays") if server._turns.collects else ("numbers", "arrays", "receipts")
        for part in same:  # of an open cycle no receipts are kept
            assert after[part] == before[part], life
        server.close()
