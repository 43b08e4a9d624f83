"""Rounds, turns, retries and endings; see ``backend_suite.py``."""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from backend_harness import MANIFEST, SIZE, Clock, Served, State, encoded, in_threads, update

from lightning_ppdl import errors, wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec, Receipt
from lightning_ppdl.server.protocol import RandomOrder, RoundRobin


def download(backend: Backend, name: str, fraction: float = 1.0, known: int | None = None) -> Any:
    return wire.decode_download(backend.download(DownloadRequest(fraction, known)), SIZE)


class ExchangeSuite(Served):
    """Every update is merged once; every turn ends; nobody waits for ever."""

    # Rounds

    def test_a_round_trip_through_the_server(self) -> None:
        server = self.add_server()
        anna, ben = self.member("anna"), self.member("ben")
        assert anna.upload(encoded("anna", values=[1.0, 2.0])) == Receipt(1, 1, staleness=0)
        assert ben.upload(encoded("ben", values=[4.0, 8.0])) == Receipt(1, 2, staleness=1)
        got = download(anna, "anna")
        assert got.version == 2 and got.complete
        np.testing.assert_array_equal(got.values, server.parameters())
        assert got.values[[0, 5]].tolist() == [5.0, 10.0]
        assert not download(anna, "anna", 0.1, known=0).complete

    def test_a_download_is_a_snapshot(self) -> None:
        self.add_server()
        anna = self.member("anna")
        messages = [anna.download(DownloadRequest(1.0)), anna.download(DownloadRequest(0.5, 0))]
        anna.upload(encoded("anna", indices=range(SIZE)))
        assert all(not wire.decode_download(message, SIZE).values.any() for message in messages)
        assert download(anna, "anna").values.all()

    def test_nobody_uploads_for_another(self) -> None:
        server = self.add_server()
        anna, _ = self.member("anna"), self.member("ben")
        before = State(server)
        with pytest.raises(errors.AuthenticationError, match="'anna'"):
            anna.upload(encoded("ben"))
        before.require_unchanged(server)
        assert server.status().rejections == {"AuthenticationError": 1}

    def test_joining_again_ends_the_earlier_session_and_what_it_held(self) -> None:
        server = self.add_server(protocol=RoundRobin(), members=["anna", "ben"])
        first = self.member("anna")
        first.take_turn(1.0)
        second = self.member("anna")
        before = State(server)
        for act in (lambda: first.upload(encoded("anna")), lambda: first.take_turn(1.0), first.renew_turn):
            with pytest.raises(errors.SessionEndedError, match="another process joined"):
                act()
        # The turn is the participant's still, but this process has not downloaded for it.
        with pytest.raises(errors.TurnNotHeldError):
            second.upload(encoded("anna"))
        before.require_unchanged(server)
        first.leave()  # says nothing to the second
        second.take_turn(1.0)
        assert second.upload(encoded("anna")).version == 1

    def test_a_bad_request_for_a_download_is_refused(self) -> None:
        self.add_server()
        backend = self.connect()
        backend.join("anna", MANIFEST)
        with pytest.raises(errors.JoinRefusedError, match="no parameters yet"):
            download(backend, "anna")
        with pytest.raises(errors.JoinRefusedError, match="no parameters yet"):
            backend.upload(encoded())
        backend.offer_initial(np.zeros(SIZE, np.float32))
        for fraction in (0.0, 1.5, float("nan")):
            with pytest.raises(errors.PPDLError, match="fraction"):
                download(backend, "anna", fraction)
        assert download(backend, "anna").version == 0

    def test_a_retry_is_answered_with_the_first_receipt(self) -> None:
        server = self.add_server()
        anna, ben = self.member("anna"), self.member("ben")
        first = anna.upload(encoded("anna"))
        ben.upload(encoded("ben"))
        before = State(server)
        for _ in range(3):
            assert anna.upload(encoded("anna")) == first
        before.require_unchanged(server)
        # Over a new connection too, as after a restart.
        anna.leave()
        assert self.member("anna").upload(encoded("anna")) == first
        assert server.parameters()[0] == 2.0

    def test_lost_rounds_leave_gaps_but_rounds_never_go_back(self) -> None:
        server = self.add_server()
        anna = self.member("anna")
        anna.upload(encoded(round_=4))
        for round_ in (1, 3):
            with pytest.raises(errors.RoundSeenBeforeError, match="upload round 5"):
                anna.upload(encoded(round_=round_))
        assert anna.upload(encoded(round_=9, base=1)).version == 2
        assert [m.rounds for m in server.status().members] == [9]

    def test_empty_and_full_updates_are_merged(self) -> None:
        server = self.add_server()
        anna = self.member("anna")
        anna.upload(encoded(round_=1, indices=[]))
        anna.upload(encoded(round_=2, indices=range(SIZE)))
        assert server.version == 2 and server.parameters().tolist() == [1.0] * SIZE

    def test_exactly_once_under_threads_and_retries(self) -> None:
        server = self.add_server()
        threads, rounds = 8, 50
        expected = np.zeros(SIZE)
        lock = threading.Lock()

        def participant(name: str, seed: int) -> None:
            chance, stream = random.Random(seed), np.random.default_rng(seed)
            backend = self.member(name)
            for round_ in range(1, rounds + 1):
                indices = np.flatnonzero(stream.random(SIZE) < 0.4)
                # Whole numbers: float32 adds them exactly, in any order.
                values = stream.integers(-8, 9, len(indices)).astype(np.float32)
                base = download(backend, name).version
                message = encoded(name, round_, base, indices=indices, values=values)
                receipts = {backend.upload(message) for _ in range(chance.choice([1, 1, 2, 3]))}
                assert len(receipts) == 1
                with lock:
                    expected[indices] += values

        in_threads(*(functools.partial(participant, f"p{i}", i) for i in range(threads)))
        assert server.version == server.status().uploads == threads * rounds
        np.testing.assert_array_equal(server.parameters(), expected)

    # Turns

    @pytest.mark.parametrize("protocol", [RoundRobin(), RandomOrder(seed=4)])
    def test_turns_across_threads(self, protocol: Any) -> None:
        names = ["anna", "ben", "cleo", "dora"]
        server = self.add_server(protocol=protocol, members=names)
        order: list[str] = []

        def participant(name: str) -> None:
            backend = self.member(name)
            for round_ in range(1, 6):
                backend.take_turn(30.0)
                base = download(backend, name).version
                order.append(name)
                assert base == len(order) - 1
                assert backend.upload(encoded(name, round_, base)).staleness == 0
            backend.leave()

        in_threads(*(functools.partial(participant, name) for name in names))
        cycles = [order[i : i + 4] for i in range(0, 20, 4)]
        assert all(sorted(cycle) == names for cycle in cycles)
        assert (len({tuple(cycle) for cycle in cycles}) == 1) == isinstance(protocol, RoundRobin)
        assert server.parameters()[0] == 20.0

    def test_nobody_acts_outside_its_turn(self) -> None:
        server = self.add_server(protocol=RoundRobin(), members=["anna", "ben"])
        anna, ben = self.member("anna"), self.member("ben")
        anna.take_turn(1.0)
        before = State(server)
        for act in (
            lambda: download(ben, "ben"),
            lambda: ben.upload(encoded("ben")),
            ben.renew_turn,
        ):
            with pytest.raises(errors.TurnNotHeldError, match="'ben' does not have the turn"):
                act()
        ben.end_turn()
        before.require_unchanged(server)
        assert anna.upload(encoded("anna")).version == 1
        # The turn was handed to ben, but a turn must be taken.
        with pytest.raises(errors.TurnNotHeldError):
            ben.upload(encoded("ben"))
        ben.take_turn(1.0)
        ben.end_turn()
        anna.take_turn(1.0)

    def test_waiting_in_vain_names_who_has_the_turn(self) -> None:
        self.add_server(protocol=RoundRobin())
        anna, ben = self.member("anna"), self.member("ben")
        anna.take_turn(1.0)
        started = time.monotonic()
        with pytest.raises(errors.TurnTimeoutError, match=r"'ben' waited 0\.2 seconds.*waiting for 'anna'"):
            ben.take_turn(0.2)
        assert 0.15 < time.monotonic() - started < 5.0

    def test_a_lease_that_ran_out_passes_the_turn(self) -> None:
        clock = Clock()
        server = self.add_server(protocol=RoundRobin(), lease_seconds=30.0, clock=clock)
        anna, ben = self.member("anna"), self.member("ben")
        anna.take_turn(1.0)
        clock.now += 20
        anna.renew_turn()
        clock.now += 29
        anna.renew_turn()
        clock.now += 31
        ben.take_turn(1.0)
        before = State(server)
        with pytest.raises(errors.TurnNotHeldError, match="lease ran out"):
            anna.upload(encoded("anna"))
        before.require_unchanged(server)
        ben.upload(encoded("ben"))
        # Asking for a turn brings anna back, behind ben.
        with pytest.raises(errors.TurnTimeoutError):
            anna.take_turn(0.05)
        ben.take_turn(1.0)
        ben.end_turn()
        anna.take_turn(1.0)
        assert anna.upload(encoded("anna", round_=2, base=1)).version == 2

    @pytest.mark.parametrize("how", ["leave", "end_turn", "upload"])
    def test_whoever_waits_is_woken_at_once(self, how: str) -> None:
        self.add_server(protocol=RoundRobin())
        anna, ben = self.member("anna"), self.member("ben")
        anna.take_turn(1.0)
        woken: list[float] = []

        def wait() -> None:
            ben.take_turn(30.0)
            woken.append(time.monotonic())

        def pass_on() -> None:
            time.sleep(0.15)
            woken.append(time.monotonic())
            anna.upload(encoded("anna")) if how == "upload" else getattr(anna, how)()

        in_threads(wait, pass_on)
        assert 0 <= woken[1] - woken[0] < 0.7

    # Endings

    def test_leaving_and_coming_back_continues_the_rounds(self) -> None:
        server = self.add_server(protocol=RoundRobin())
        anna, ben = self.member("anna"), self.member("ben")
        for round_ in (1, 2):
            anna.take_turn(1.0)
            anna.upload(encoded("anna", round_))
            ben.take_turn(1.0)
            ben.end_turn()
        anna.leave()
        anna.leave()
        assert [(m.name, m.present, m.rounds) for m in server.status().members] == [
            ("anna", False, 2),
            ("ben", True, 0),
        ]
        for _ in range(2):
            ben.take_turn(1.0)
            ben.end_turn()
        membership = self.connect().join("anna", MANIFEST)
        assert membership.last_round == 2 and membership.version == 2 and not membership.needs_initial
        # One that left may use the same connection again.
        assert dataclasses.replace(anna.join("anna", MANIFEST), session=membership.session) == membership

    def test_a_closed_server_refuses_everything_and_wakes_who_waits(self) -> None:
        server = self.add_server(protocol=RoundRobin())
        anna, ben = self.member("anna"), self.member("ben")
        anna.take_turn(1.0)

        def wait() -> None:
            with pytest.raises(errors.ServerClosedError):
                ben.take_turn(30.0)

        def close() -> None:
            time.sleep(0.1)
            server.close()

        started = time.monotonic()
        in_threads(wait, close)
        assert time.monotonic() - started < 5.0
        for act in (
            lambda: anna.upload(encoded("anna")),
            lambda: download(anna, "anna"),
            lambda: anna.offer_initial(np.zeros(SIZE, np.float32)),
            anna.renew_turn,
            anna.end_turn,
            lambda: anna.take_turn(1.0),
        ):
            with pytest.raises(errors.ServerClosedError):
                act()
        anna.leave()
        assert server.parameters().tolist() == [0.0] * SIZE

    def test_status(self) -> None:
        clock = Clock()
        server = self.add_server(protocol=RoundRobin(), clock=clock)
        assert (server.status().parameters, server.status().awaited, server.status().members) == (0, (), ())
        anna, ben = self.member("anna"), self.member("ben")
        anna.take_turn(1.0)
        message = anna.download(DownloadRequest(1.0))
        upload = encoded("anna")
        clock.now += 7
        anna.upload(upload)
        clock.now += 2
        status = ben.status()
        assert (status.version, status.parameters, status.awaited, status.uploads) == (1, SIZE, ("ben",), 1)
        assert (status.uploaded_bytes, status.downloaded_bytes) == (len(upload), len(message))
        assert [(m.name, m.present, m.rounds, m.idle_seconds) for m in status.members] == [
            ("anna", True, 1, 2.0),
            ("ben", True, 0, 9.0),
        ]

    def test_a_participant_costs_the_server_no_vector(self) -> None:
        size, participants = 100_000, 200
        large = Manifest((ParameterSpec("w", (size,), "float32"),))
        server = self.add_server(initial=np.zeros(size, np.float32))
        server.join("first", large)
        tracemalloc.start()
        try:
            for i in range(participants):
                session = server.join(f"p{i}", large).session
                server.download(session, DownloadRequest(1.0))
                server.upload(session, wire.encode_update(update(f"p{i}", indices=range(size)), size))
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # One byte an entry for each would be five million.
        assert grown < 0.1 * size * participants
