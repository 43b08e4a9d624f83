"""The synchronous protocol: what a cycle merges, who is in it, and how it ends; see ``backend_suite.py``."""

from __future__ import annotations

import functools
import logging
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from backend_harness import MANIFEST, SIZE, Clock, Served, State, encoded, in_threads, manifest, update

from lightning_ppdl import errors, wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.records import DownloadRequest, Manifest, ParameterSpec, Receipt
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import ServerMomentum, ServerOptimizer
from lightning_ppdl.server.protocol import Synchronous

NOT_NOW = 0.02


def base(backend: Backend, name: str) -> int:
    return wire.decode_download(backend.download(DownloadRequest(1.0)), SIZE).version


class SynchronousSuite(Served):
    """Everyone trains from the same version; the mean is merged, once; nobody is waited for without end."""

    def cohort(self, *names: str, **settings: Any) -> tuple[ParameterServer, list[Backend]]:
        """A server whose first cycle all of ``names`` are in, and have taken their turn of."""
        protocol = settings.pop("protocol", Synchronous())
        make = self.make_server if "merge" in settings else self.add_server
        server = make(protocol=protocol, initial=np.zeros(SIZE, np.float32), **settings)
        members = [self.member(name) for name in names]
        for backend in members:
            backend.take_turn(1.0)
        return server, members

    def test_the_mean_of_all_uploads_is_one_version(self) -> None:
        server, (anna, ben, cleo) = self.cohort("anna", "ben", "cleo")
        assert [base(b, n) for b, n in ((anna, "anna"), (ben, "ben"), (cleo, "cleo"))] == [0, 0, 0]
        assert anna.upload(encoded("anna", indices=[0, 5], values=[3.0, 1.0])) == Receipt(1, 1, staleness=0)
        assert ben.upload(encoded("ben", indices=[5, 7], values=[1.5, -6.0])) == Receipt(1, 1, staleness=0)
        assert server.version == 0 and not server.parameters().any()
        assert server.status().awaited == ("cleo",)
        assert cleo.upload(encoded("cleo", indices=[])) == Receipt(1, 1, staleness=0)
        # Over all that uploaded: who left an entry out counts as zero in it.
        expected = np.zeros(SIZE, np.float32)
        expected[[0, 5, 7]] = [1.0, np.float32(2.5 / 3), -2.0]
        np.testing.assert_array_equal(server.parameters(), expected)
        assert (server.version, server.status().uploads) == (1, 3)

    def test_who_has_uploaded_waits_for_the_others(self) -> None:
        _, (anna, ben) = self.cohort("anna", "ben")
        anna.upload(encoded("anna"))
        with pytest.raises(errors.TurnTimeoutError, match="waiting for 'ben'"):
            anna.take_turn(NOT_NOW)
        with pytest.raises(errors.TurnNotHeldError, match="'anna' does not have the turn"):
            anna.upload(encoded("anna", round_=2))
        ben.upload(encoded("ben"))
        anna.take_turn(1.0)
        assert base(anna, "anna") == 1

    def test_cycles_across_threads(self) -> None:
        names = ["anna", "ben", "cleo", "dora"]
        server = self.add_server(protocol=Synchronous(), members=names, initial=np.zeros(SIZE, np.float32))

        def participant(name: str, value: float) -> None:
            backend = self.member(name)
            for round_ in range(1, 21):
                backend.take_turn(30.0)
                version = base(backend, name)
                assert version == round_ - 1
                message = encoded(name, round_, version, indices=range(SIZE), values=[value] * SIZE)
                assert {backend.upload(message) for _ in range(2)} == {Receipt(round_, round_, 0)}
            # Whoever is done goes at once: its upload stays in the sum.
            backend.leave()

        started = time.monotonic()
        in_threads(*(functools.partial(participant, name, 2.0**i) for i, name in enumerate(names)))
        assert time.monotonic() - started < 10.0
        assert server.version == 20 and server.status().uploads == 80
        assert server.parameters().tolist() == [20 * 15 / 4] * SIZE

    def test_a_retry_gets_its_receipt_before_and_after_the_merge(self) -> None:
        server, (anna, ben) = self.cohort("anna", "ben")
        first = anna.upload(encoded("anna", values=[2.0, 2.0]))
        assert anna.upload(encoded("anna", values=[2.0, 2.0])) == first
        with pytest.raises(errors.RoundSeenBeforeError):
            anna.upload(encoded("anna", values=[2.0, 3.0]))
        ben.upload(encoded("ben"))
        before = State(server)
        assert anna.upload(encoded("anna", values=[2.0, 2.0])) == first
        anna.leave()
        assert self.member("anna").upload(encoded("anna", values=[2.0, 2.0])) == first
        assert server.parameters()[0] == 1.5 and server.version == 1
        assert before.parameters is not None and before.parameters[0] == 1.5

    def test_a_refused_upload_leaves_the_sum_and_may_be_made_good(self) -> None:
        server, (anna, ben) = self.cohort("anna", "ben")
        with pytest.raises(errors.NonFiniteValueError):
            anna.upload(encoded("anna", indices=[1], values=[np.inf]))
        anna.upload(encoded("anna", indices=[1], values=[2.0]))
        ben.upload(encoded("ben", indices=[]))
        assert server.parameters()[1] == 1.0

    # Who is in a cycle

    def test_the_first_to_come_does_not_train_alone(self) -> None:
        self.add_server(protocol=Synchronous(min_members=3))
        anna, ben = self.member("anna"), self.member("ben")
        for backend in (anna, ben):
            with pytest.raises(errors.TurnTimeoutError, match="waiting for others to join"):
                backend.take_turn(NOT_NOW)
        cleo = self.member("cleo")
        for backend in (anna, ben, cleo):
            backend.take_turn(1.0)
        # It is a start, not a rule: the last one may finish its rounds.
        anna.leave()
        ben.leave()
        assert cleo.upload(encoded("cleo")).version == 1
        cleo.take_turn(1.0)

    def test_members_that_have_not_come_are_named_and_passed_over_after_the_lease(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = Clock()
        server = self.add_server(
            protocol=Synchronous(), members=["anna", "ben", "cleo"], lease_seconds=30.0, clock=clock
        )
        anna = self.member("anna")
        with pytest.raises(errors.TurnTimeoutError, match="waiting for 'ben', 'cleo'"):
            anna.take_turn(NOT_NOW)
        ben = self.member("ben")
        for backend, name in ((anna, "anna"), (ben, "ben")):
            backend.take_turn(1.0)
            backend.upload(encoded(name))
        assert server.status().awaited == ("cleo",) and server.version == 0
        clock.now += 31
        anna.take_turn(1.0)
        assert server.version == 1
        assert "'cleo' (gave no sign of life for 30 seconds)" in caplog.text
        assert set(server.status().awaited) == {"anna", "ben"}

    def test_who_joins_in_the_middle_is_in_the_next_cycle(self) -> None:
        server, (anna, ben) = self.cohort("anna", "ben")
        cleo = self.member("cleo")
        with pytest.raises(errors.TurnTimeoutError):
            cleo.take_turn(NOT_NOW)
        with pytest.raises(errors.TurnNotHeldError):
            cleo.upload(encoded("cleo"))
        anna.upload(encoded("anna"))
        ben.upload(encoded("ben"))
        assert server.version == 1
        cleo.take_turn(1.0)
        assert set(server.status().awaited) == {"anna", "ben", "cleo"}

    @pytest.mark.parametrize("how", ["leave", "end_turn"])
    def test_a_cycle_does_not_wait_for_who_gave_up(self, how: str) -> None:
        server, (anna, ben, cleo) = self.cohort("anna", "ben", "cleo")
        anna.upload(encoded("anna", values=[4.0, 4.0]))
        getattr(ben, how)()
        cleo.upload(encoded("cleo", values=[2.0, 2.0]))
        assert server.version == 1 and server.parameters()[0] == 3.0
        anna.take_turn(1.0)
        assert set(server.status().awaited) == {"anna", "cleo"} | ({"ben"} if how == "end_turn" else set())

    def test_the_last_cycle_is_merged_when_all_have_left(self) -> None:
        server, (anna, ben) = self.cohort("anna", "ben")
        anna.upload(encoded("anna", values=[4.0, 4.0]))
        anna.leave()
        ben.leave()
        assert server.version == 1 and server.parameters()[0] == 4.0

    def test_the_last_to_leave_does_not_wait_for_members_that_never_came(self) -> None:
        server = self.add_server(
            protocol=Synchronous(min_members=1), members=["anna", "ben"], initial=np.zeros(SIZE, np.float32)
        )
        anna = self.member("anna")
        anna.take_turn(1.0)
        anna.upload(encoded("anna"))
        assert server.version == 0
        anna.leave()
        assert server.version == 1 and server.parameters()[0] == 1.0

    def test_it_is_merged_though_the_last_one_died(self) -> None:
        clock = Clock()
        server, (anna, _) = self.cohort("anna", "ben", clock=clock, lease_seconds=30.0)
        anna.upload(encoded("anna"))
        anna.leave()
        assert server.parameters()[0] == 0.0
        clock.now += 31
        assert server.parameters()[0] == 1.0

    def test_a_cycle_nobody_uploads_in_merges_nothing_and_the_next_one_begins(self) -> None:
        server, (anna, ben) = self.cohort("anna", "ben")
        anna.end_turn()
        ben.end_turn()
        assert server.version == 0
        for backend, name in ((anna, "anna"), (ben, "ben")):
            backend.take_turn(1.0)
            backend.upload(encoded(name))
        assert server.version == 1

    # Deadlines, leases, quorums

    def test_at_the_deadline_those_who_came_are_merged(self, caplog: pytest.LogCaptureFixture) -> None:
        clock = Clock()
        protocol = Synchronous(quorum=0.6, deadline_seconds=10.0)
        server, (anna, ben, cleo) = self.cohort("anna", "ben", "cleo", protocol=protocol, clock=clock)
        anna.upload(encoded("anna", values=[4.0, 4.0]))
        clock.now += 10
        ben.upload(encoded("ben", values=[2.0, 2.0]))  # exactly then is in time
        assert server.version == 0
        clock.now += 0.1
        with pytest.raises(errors.LateUpdateError, match="'cleo' is too late"):
            cleo.renew_turn()
        assert server.version == 1 and server.parameters()[0] == 3.0
        assert "mean of 2 updates, without 'cleo' (not within 10 seconds)" in caplog.text
        before = State(server)
        with pytest.raises(errors.LateUpdateError):
            cleo.upload(encoded("cleo"))
        before.require_unchanged(server)
        # The late one goes on with the next cycle, from what was merged without it.
        cleo.take_turn(1.0)
        with pytest.raises(errors.LateUpdateError, match="based on version 0"):
            cleo.upload(encoded("cleo"))
        assert base(cleo, "cleo") == 1
        assert cleo.upload(encoded("cleo", round_=2, base=1)) == Receipt(2, 2, staleness=0)

    def test_whoever_waits_is_woken_by_the_deadline_itself(self) -> None:
        server, (anna, _) = self.cohort("anna", "ben", protocol=Synchronous(deadline_seconds=0.3))
        anna.upload(encoded("anna"))
        started = time.monotonic()
        anna.take_turn(30.0)
        assert 0.1 < time.monotonic() - started < 0.9
        assert server.version == 1

    def test_a_deadline_between_the_turn_and_the_download_costs_nothing(self) -> None:
        clock = Clock()
        server, (anna, ben) = self.cohort(
            "anna", "ben", protocol=Synchronous(deadline_seconds=10.0), clock=clock
        )
        anna.upload(encoded("anna"))
        clock.now += 11
        assert base(ben, "ben") == 1
        anna.take_turn(1.0)
        ben.upload(encoded("ben", base=1))
        anna.upload(encoded("anna", round_=2, base=1))
        assert server.version == 2

    def test_without_a_quorum_nothing_is_merged_and_all_begin_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = Clock()
        protocol = Synchronous(quorum=2, deadline_seconds=10.0)
        server, (anna, ben) = self.cohort("anna", "ben", protocol=protocol, clock=clock)
        anna.upload(encoded("anna", values=[64.0, 64.0]))
        clock.now += 11
        anna.take_turn(1.0)
        assert server.version == 0 and not server.parameters().any()
        assert "nothing is merged, for 1 updates are fewer than 2" in caplog.text
        # What was left out of one cycle is not in the next.
        ben.take_turn(1.0)
        anna.upload(encoded("anna", round_=2))
        ben.upload(encoded("ben", round_=2))
        assert server.version == 1 and server.parameters()[0] == 1.0

    def test_the_quorum_holds_without_a_deadline_and_leaving_is_no_failure(self) -> None:
        server, (anna, ben, cleo) = self.cohort("anna", "ben", "cleo", protocol=Synchronous(quorum=1.0))
        ben.leave()
        anna.upload(encoded("anna"))
        cleo.upload(encoded("cleo"))
        assert server.version == 1
        anna.take_turn(1.0)
        anna.upload(encoded("anna", round_=2, base=1))
        cleo.end_turn()
        assert server.version == 1

    def test_signs_of_life_keep_a_place_and_silence_loses_it(self) -> None:
        clock = Clock()
        server, (anna, ben, cleo) = self.cohort("anna", "ben", "cleo", lease_seconds=30.0, clock=clock)
        anna.upload(encoded("anna"))
        for _ in range(4):
            clock.now += 20
            ben.renew_turn()
        assert server.status().awaited == ("ben",)
        with pytest.raises(errors.LateUpdateError, match="lease of 30 seconds"):
            cleo.upload(encoded("cleo"))
        ben.upload(encoded("ben"))
        assert server.version == 1

    def test_the_dead_are_waited_for_once_even_if_deadlines_are_shorter_than_leases(self) -> None:
        clock = Clock()
        protocol = Synchronous(deadline_seconds=10.0)
        server, (anna, _) = self.cohort("anna", "ben", protocol=protocol, lease_seconds=25.0, clock=clock)
        started = clock.now
        for round_ in range(1, 11):
            anna.upload(encoded("anna", round_, server.version))
            while server.version < round_:
                clock.now += 1.0
            anna.take_turn(1.0)
        assert server.status().awaited == ("anna",)
        assert clock.now - started == 26.0

    def test_a_late_one_that_is_alive_stays_in_the_cohort(self) -> None:
        clock = Clock()
        protocol = Synchronous(deadline_seconds=10.0)
        server, (anna, ben) = self.cohort("anna", "ben", protocol=protocol, lease_seconds=25.0, clock=clock)
        for round_ in (1, 2, 3):
            clock.now += 11
            with pytest.raises(errors.LateUpdateError):
                ben.renew_turn()
            anna.take_turn(1.0)
            anna.upload(encoded("anna", round_, server.version))
            assert server.status().awaited == ("ben",)

    # Merge rules

    def test_momentum_acts_once_a_cycle(self) -> None:
        server, (anna, ben) = self.cohort("anna", "ben", merge=ServerMomentum(0.5))
        for round_ in (1, 2, 3):
            for backend, name, value in ((anna, "anna", 1.0), (ben, "ben", 3.0)):
                backend.take_turn(1.0)
                backend.upload(encoded(name, round_, round_ - 1, indices=[4], values=[value]))
        assert server.parameters()[4] == 2.0 + (1.0 + 2.0) + (1.5 + 2.0)

    def test_an_optimizer_steps_once_a_cycle_on_the_mean_gradient(self) -> None:
        gradients = manifest(quantity="gradient")
        merge = ServerOptimizer(functools.partial(torch.optim.SGD, lr=0.5))
        server = self.make_server(protocol=Synchronous(), merge=merge)
        members = [self.member(name, gradients) for name in ("anna", "ben")]
        for backend in members:
            backend.take_turn(1.0)
        members[0].upload(encoded("anna", indices=[2], values=[4.0]))
        members[1].upload(encoded("ben", indices=[3], values=[8.0]))
        assert server.parameters()[[2, 3]].tolist() == [-1.0, -2.0] and server.version == 1

    def test_a_cohort_of_many_costs_the_server_no_vector_each(self) -> None:
        size, participants = 100_000, 50
        large = Manifest((ParameterSpec("w", (size,), "float32"),))
        server = self.add_server(protocol=Synchronous(), initial=np.zeros(size, np.float32))
        sessions = [server.join(f"p{i}", large).session for i in range(participants)]
        assert all(server.take_turn(session) for session in sessions)
        every, values = np.arange(size), np.ones(size, np.float32)
        tracemalloc.start()
        try:
            for i, session in enumerate(sessions[:-1]):
                message = wire.encode_update(update(f"p{i}", indices=every, values=values), size)
                server.upload(session, message)
                del message
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert server.version == 0
        assert grown < 10 * size

    def test_closing_wakes_who_waits_for_a_cycle(self) -> None:
        server, (anna, _) = self.cohort("anna", "ben")
        anna.upload(encoded("anna"))

        def wait() -> None:
            with pytest.raises(errors.ServerClosedError):
                anna.take_turn(30.0)

        def close() -> None:
            time.sleep(0.1)
            server.close()

        started = time.monotonic()
        in_threads(wait, close)
        assert time.monotonic() - started < 5.0

    def test_one_that_comes_back_goes_on_in_its_cycle(self, caplog: pytest.LogCaptureFixture) -> None:
        server, (anna, _) = self.cohort("anna", "ben")
        reborn = self.connect()
        with caplog.at_level(logging.INFO):
            reborn.join("ben", MANIFEST)
            reborn.take_turn(1.0)
            anna.upload(encoded("anna"))
            reborn.upload(encoded("ben"))
        assert server.version == 1 and "without anybody missing" in caplog.text
