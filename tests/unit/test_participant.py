"""One participant's rounds, without Lightning: what it starts from, what it sends, what it survives."""

from __future__ import annotations

import functools
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ppdl import errors
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.participant import OnUnreachable, Participant
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.records import Manifest, ParameterSpec, Quantity, Receipt
from lightning_ppdl.selection import LargestValues, RandomAboveThreshold, Selection
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add, ServerOptimizer
from lightning_ppdl.server.protocol import Asynchronous, RoundRobin

SIZE = 10
_numbers = itertools.count()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class LossyBackend(MemoryBackend):
    """Loses the next uploads, before or after they reached the server."""

    lose: list[str] = []  # noqa: RUF012
    down = False

    def take_turn(self, timeout_seconds: float) -> None:
        if self.down:
            raise errors.ServerUnavailableError("the cable is out")
        super().take_turn(timeout_seconds)

    def upload(self, message: bytes) -> Receipt:
        when = self.lose.pop(0) if self.lose else ""
        if when == "good":
            raise errors.UploadLostError("it fell into the sea")
        if when == "before":
            raise errors.ServerUnavailableError("the cable is out")
        receipt = super().upload(message)
        if when == "after":
            raise errors.ServerUnavailableError("the answer got lost")
        return receipt


@pytest.fixture
def server() -> ParameterServer:
    return ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))


def participant(
    server: ParameterServer,
    name: str = "anna",
    fraction: float = 1.0,
    quantity: Quantity = "change",
    bound: float | None = None,
    selection: Selection | None = None,
    join: bool = True,
    on_unreachable: OnUnreachable = "wait",
    overlap: bool = False,
) -> Participant:
    release = PlainRelease(selection or LargestValues(1.0), bound)
    manifest = Manifest(
        (ParameterSpec("w", (SIZE,), "float32"),), quantity, release.max_fraction(SIZE), bound
    )
    backend = LossyBackend(f"memory://unit-{next(_numbers)}", server)
    backend.lose = []
    made = Participant(
        name,
        backend,
        manifest,
        release,
        fraction,
        turn_timeout_seconds=5.0,
        on_unreachable=on_unreachable,
        unreachable_seconds=7.0,
        overlap=overlap,
    )
    if join:
        made.join()
    return made


def lossy(member: Participant) -> LossyBackend:
    backend = member._exchange.backend
    assert isinstance(backend, LossyBackend)
    return backend


def entries(**changes: float) -> Tensor:
    """A vector of zeros but for e.g. ``_3=1.0``."""
    vector = torch.zeros(SIZE)
    for index, value in changes.items():
        vector[int(index[1:])] = value
    return vector


def begin(member: Participant, local: Tensor) -> Tensor:
    """Begin a round that is to be shared."""
    start = member.begin_round(local)
    assert start is not None
    return start


def play(member: Participant, local: Tensor, change: Tensor) -> Tensor:
    """One round whose training adds ``change``; returns the local parameters after it."""
    local = begin(member, local) + change
    member.end_round(local)
    return local


def test_the_change_of_the_round_is_what_is_uploaded(server: ParameterServer) -> None:
    anna = participant(server, bound=1.0, selection=LargestValues(0.2))
    start = begin(anna, torch.full((SIZE,), 9.0))
    assert start.tolist() == [0.0] * SIZE
    report = anna.end_round(start + entries(_1=0.5, _2=-3.0, _3=0.25))
    np.testing.assert_array_equal(server.parameters(), entries(_1=0.5, _2=-1.0))
    assert (report.round, report.merged, report.staleness) == (1, True, 0)
    assert report.uploaded_fraction == 0.2 and report.clamped_fraction == 0.5
    assert report.update_norm == pytest.approx(1.25**0.5)
    assert report.uploaded_bytes == server.status().uploaded_bytes
    assert report.downloaded_bytes == server.status().downloaded_bytes


def test_training_in_place_is_seen(server: ParameterServer) -> None:
    anna = participant(server)
    local = begin(anna, torch.zeros(SIZE))
    local += 1.0
    anna.end_round(local)
    assert server.parameters().tolist() == [1.0] * SIZE


def test_everything_downloaded_is_the_servers_vector(server: ParameterServer) -> None:
    anna, ben = participant(server), participant(server, "ben")
    stream = torch.Generator().manual_seed(0)
    here, there = torch.zeros(SIZE), torch.zeros(SIZE)
    for _ in range(8):
        there = play(ben, there, torch.randn(SIZE, generator=stream) * entries(_2=1, _5=1))
        start = begin(anna, here)
        np.testing.assert_array_equal(start, server.parameters())
        here = start + torch.randn(SIZE, generator=stream)
        anna.end_round(here)


def test_a_sparse_complete_download_starts_from_what_the_server_sent(server: ParameterServer) -> None:
    anna, ben = participant(server, selection=LargestValues(0.1)), participant(server, "ben")
    here = play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    play(ben, torch.zeros(SIZE), entries(_7=5.0))
    start = begin(anna, here)
    assert anna.end_round(start).downloaded_bytes < 4 * SIZE + 60
    np.testing.assert_array_equal(start, entries(_0=1.0, _7=5.0))


def test_a_fraction_downloaded_leaves_the_rest_local(server: ParameterServer) -> None:
    anna, ben = participant(server, fraction=0.2, selection=LargestValues(0.1)), participant(server, "ben")
    here = play(anna, torch.zeros(SIZE), torch.arange(1.0, SIZE + 1))
    for _ in range(2):
        play(ben, torch.zeros(SIZE), entries(_0=-1.0, _1=-1.0))
    start = begin(anna, here)
    expected = torch.arange(1.0, SIZE + 1)
    expected[:2] = -2.0
    assert start.tolist() == expected.tolist()
    anna.end_round(start + entries(_4=0.5))
    np.testing.assert_array_equal(server.parameters(), entries(_0=-2.0, _1=-2.0, _4=0.5, _9=10.0))


@pytest.mark.parametrize(("first", "then"), [(0.2, 1.0), (1.0, 0.2)])
def test_resuming_with_another_download_fraction(server: ParameterServer, first: float, then: float) -> None:
    anna, ben = participant(server, fraction=first, selection=LargestValues(0.1)), participant(server, "ben")
    here = play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    here = play(anna, here, torch.ones(SIZE))
    play(ben, torch.zeros(SIZE), entries(_8=4.0))
    resumed = participant(server, fraction=then, join=False)
    resumed.load_state_dict(anna.state_dict())
    resumed.join()
    start = begin(resumed, here)
    if then == 1.0:
        np.testing.assert_array_equal(start, server.parameters())
    else:
        assert start[8] == 4.0 and start[9] == here[9]


def test_gradients_are_summed_and_sent_instead() -> None:
    server = ParameterServer(
        merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=0.5)),
        initial=np.zeros(SIZE, np.float32),
    )
    anna = participant(server, quantity="gradient", bound=3.0)
    for expected in ([-1.5, -1.5], [-3.0, -3.0]):
        local = begin(anna, torch.zeros(SIZE))
        for _ in range(2):
            anna.gradients.add_(entries(_0=1.0, _3=2.0))
        anna.gradients.add_(entries(_0=1.0))
        # What the optimizer makes of the gradients here is not shared.
        assert anna.end_round(local + 100).clamped_fraction == 0.5
        assert server.parameters()[[0, 3]].tolist() == expected
    assert np.count_nonzero(server.parameters()) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unanswered_upload_is_sent_again_before_the_next_round(
    server: ParameterServer, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    anna = participant(server)
    local = play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    lossy(anna).lose = [when]
    local = begin(anna, local) + 1.0
    report = anna.end_round(local)
    assert (report.round, report.merged, report.staleness) == (2, False, 0)
    assert report.uploaded_bytes > 0 and "sent again before the next round: the " in caplog.text
    assert server.status().uploads == (1 if when == "before" else 2)
    start = begin(anna, local)
    np.testing.assert_array_equal(start, server.parameters())
    assert server.status().uploads == 2 == server.parameters()[0]
    assert anna.end_round(start + 1.0).merged
    assert server.status().uploads == 3 == server.parameters()[0]
    assert server.status().members[0].rounds == 3


def test_an_upload_that_is_lost_for_good_is_not_sent_again(server: ParameterServer) -> None:
    anna = participant(server)
    lossy(anna).lose = ["good"]
    assert not anna.end_round(begin(anna, torch.zeros(SIZE)) + 1.0).merged
    play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    assert server.status().uploads == 1 == server.parameters()[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unanswered_upload_outlives_its_process_in_the_checkpoint(
    server: ParameterServer, when: str
) -> None:
    anna = participant(server)
    lossy(anna).lose = [when]
    assert not anna.end_round(begin(anna, torch.zeros(SIZE)) + 1.0).merged
    kept = io.BytesIO()
    torch.save(anna.state_dict(), kept)
    again = participant(server, join=False)
    again.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    again.join()
    play(again, torch.zeros(SIZE), torch.ones(SIZE))
    assert server.status().uploads == 2 == server.parameters()[0]
    assert again.round == 2


def test_a_round_shared_after_the_checkpoint_is_trained_again_but_not_shared_again(
    server: ParameterServer,
) -> None:
    anna = participant(server)
    play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    state = anna.state_dict()
    for _ in range(2):
        play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    again = participant(server, join=False)
    again.load_state_dict(state)
    again.join()
    told: list[str] = []
    again.listen(told.append)
    for round_ in (2, 3):
        assert again.begin_round(torch.zeros(SIZE)) is None
        assert again.round == round_ and not again.in_round
        assert f"round {round_}" in told[-1] and "before the restart" in told[-1]
    assert server.status().uploads == 3
    play(again, torch.zeros(SIZE), torch.ones(SIZE))
    assert again.round == 4 and server.status().uploads == 4 == server.parameters()[0]


def test_a_checkpoint_in_the_middle_of_a_round_goes_on_with_it(server: ParameterServer) -> None:
    anna = participant(server)
    play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    half = begin(anna, torch.zeros(SIZE)) + 2 * torch.ones(SIZE)
    state = anna.state_dict()
    anna.leave()
    play(participant(server, "ben"), torch.zeros(SIZE), torch.ones(SIZE))
    downloaded = server.status().downloaded_bytes
    again = participant(server, join=False)
    again.load_state_dict(state)
    again.join()
    assert again.begin_round(half) is None and again.in_round
    assert server.status().downloaded_bytes == downloaded
    report = again.end_round(half + torch.ones(SIZE))
    assert again.round == 2 and report.merged and report.downloaded_bytes == 0 and report.staleness == 1
    # Both halves of the round, on top of what came in between.
    assert set(server.parameters().tolist()) == {5.0}
    assert begin(again, half)[0] == 5


def test_a_checkpoint_of_an_open_round_keeps_its_gradients() -> None:
    server = ParameterServer(
        merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=0.1)), initial=np.zeros(SIZE, np.float32)
    )
    anna = participant(server, quantity="gradient")
    begin(anna, torch.zeros(SIZE))
    anna.gradients.add_(1)
    again = participant(server, quantity="gradient", join=False)
    again.load_state_dict(anna.state_dict())
    again.join()
    assert again.begin_round(torch.zeros(SIZE)) is None and again.in_round
    assert again.gradients.tolist() == [1.0] * SIZE


def test_an_open_round_is_begun_anew_where_it_was_given_up_or_the_server_is_another(
    server: ParameterServer,
) -> None:
    anna = participant(server)
    play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    begin(anna, torch.zeros(SIZE))
    given_up, kept = anna.state_dict(open_round=False), anna.state_dict()
    other = ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))
    for state, home, values in ((given_up, server, 1.0), (kept, other, 0.0)):
        again = participant(home, join=False)
        again.load_state_dict(state)
        again.join()
        start = again.begin_round(torch.full((SIZE,), 7.0))
        assert start is not None and again.in_round and again.round == 2
        assert start.tolist() == [values] * SIZE


def in_flight(server: ParameterServer, **settings: Any) -> Participant:
    return participant(server, overlap=True, **settings)


def test_the_next_round_begins_while_an_exchange_is_on_its_way() -> None:
    server = ParameterServer(Asynchronous(), Add(), initial=np.zeros(SIZE, np.float32))
    anna = in_flight(server)
    local = begin(anna, torch.zeros(SIZE)) + 1
    anna.end_round_in_flight(local)
    assert anna.in_flight and not anna.in_round
    anna._exchange._courier.download()  # type: ignore[union-attr]
    play(participant(server, "ben"), torch.zeros(SIZE), torch.full((SIZE,), 10.0))
    assert anna.begin_round(local) is None and anna.in_round and anna.round == 2
    local = local + 2  # the steps made meanwhile
    report, start = anna.settle(local)
    assert report.round == 1 and report.merged and report.uploaded_bytes > 0
    # Downloaded: her own 1, for ben came later; and the steps since.
    assert start is not None and start.tolist() == [3.0] * SIZE and not anna.in_flight
    anna.end_round_in_flight(start + 4)
    report, nothing = anna.settle(start + 4)
    assert report.round == 2 and report.staleness == 1 and nothing is None
    assert server.parameters().tolist() == [1 + 10 + 2 + 4] * SIZE


def test_gradients_made_meanwhile_belong_to_the_round_that_began() -> None:
    optimizer = ServerOptimizer(functools.partial(torch.optim.SGD, lr=1.0))
    server = ParameterServer(Asynchronous(), optimizer, initial=np.zeros(SIZE, np.float32))
    anna = in_flight(server, quantity="gradient")
    local = begin(anna, torch.zeros(SIZE))
    anna.gradients.add_(-1)
    anna.end_round_in_flight(local)
    assert anna.begin_round(local) is None
    anna.gradients.add_(-2)
    assert anna.settle(local)[1] is not None
    anna.gradients.add_(-3)
    anna.end_round(local)
    assert server.parameters().tolist() == [6.0] * SIZE


def test_a_rounded_vector_is_no_change_with_steps_made_meanwhile_either() -> None:
    server = ParameterServer(Asynchronous(), Add(), initial=np.zeros(SIZE, np.float32))
    anna = in_flight(server)
    local = begin(anna, torch.zeros(SIZE)) + 0.1
    anna.end_round_in_flight(local)
    anna.begin_round(local)
    _, start = anna.settle(local + 1)
    assert start is not None
    anna.started_from(start + 0.01)  # what a lower precision made of it
    anna.end_round(start + 0.01)
    np.testing.assert_allclose(server.parameters(), 0.1 + 1, rtol=1e-6)


def test_an_exchange_in_flight_is_in_the_checkpoint_as_not_answered_yet() -> None:
    server = ParameterServer(Asynchronous(), Add(), initial=np.zeros(SIZE, np.float32))
    anna = in_flight(server)
    local = begin(anna, torch.zeros(SIZE)) + 1
    anna.end_round_in_flight(local)
    anna.begin_round(local)
    state = anna.state_dict()
    assert state["unsent"] is not None and state["open"] is None and state["round"] == 1
    anna.leave()
    assert server.status().uploads == 1
    again = in_flight(server, join=False)
    again.load_state_dict(state)
    again.join()
    assert begin(again, local).tolist() == [1.0] * SIZE
    assert server.status().uploads == 1 and again.round == 2


@pytest.mark.parametrize("choice", ["wait", "local"])
def test_a_server_that_cannot_be_reached_in_flight(choice: OnUnreachable) -> None:
    server = ParameterServer(Asynchronous(), Add(), initial=np.zeros(SIZE, np.float32))
    anna = in_flight(server, on_unreachable=choice)
    local = begin(anna, torch.zeros(SIZE)) + 1
    lossy(anna).lose = ["before"]
    anna.end_round_in_flight(local)
    anna.begin_round(local)
    if choice == "wait":
        with pytest.raises(errors.ServerUnavailableError, match="cable"):
            anna.settle(local)
        return
    report, start = anna.settle(local)
    assert not report.merged and start is None and not anna.in_round and anna.round == 1
    # What was not answered is sent before the next round, which begins with a download.
    assert begin(anna, local).tolist() == [1.0] * SIZE and server.status().uploads == 1


def test_a_server_that_gives_turns_refuses_to_train_meanwhile() -> None:
    turns = ParameterServer(RoundRobin(), Add(), initial=np.zeros(SIZE, np.float32))
    with pytest.raises(errors.ConfigurationError, match=r"overlap_steps at 0, or serve protocol=asynch"):
        in_flight(turns)


@pytest.mark.parametrize(("choice", "patience"), [("wait", 7.0), ("local", 0.0), ("fail", 0.0)])
def test_what_to_do_while_the_server_cannot_be_reached(
    server: ParameterServer, choice: OnUnreachable, patience: float
) -> None:
    anna = participant(server, on_unreachable=choice)
    backend = lossy(anna)
    assert backend.patience_seconds == patience
    told: list[str] = []
    anna.listen(told.append)
    backend.down = True
    if choice == "local":
        assert anna.begin_round(torch.zeros(SIZE)) is None
        assert anna.begin_round(torch.zeros(SIZE)) is None
        assert (
            not anna.in_round and anna.round == 0 and len(told) == 2 and "trains this round alone" in told[0]
        )
    else:
        with pytest.raises(errors.ServerUnavailableError, match="the cable is out"):
            anna.begin_round(torch.zeros(SIZE))
    backend.down = False
    play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    assert anna.round == 1 == server.parameters()[0]


def test_a_lease_that_ran_out_loses_the_round_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    server = ParameterServer(
        protocol=RoundRobin(), initial=np.zeros(SIZE, np.float32), lease_seconds=10.0, clock=clock
    )
    anna, ben = participant(server), participant(server, "ben")
    local = begin(anna, torch.zeros(SIZE)) + 1.0
    clock.now += 11
    there = begin(ben, torch.zeros(SIZE))
    assert not anna.end_round(local).merged
    assert "lease ran out" in caplog.text
    assert ben.end_round(there + 3.0).merged
    ben.leave()
    start = begin(anna, local)
    assert start.tolist() == [3.0] * SIZE
    assert anna.end_round(start + 1.0).round == 2
    assert server.parameters().tolist() == [4.0] * SIZE


def test_a_sign_of_life_keeps_the_turn_and_a_late_one_only_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, here = Clock(), Clock()
    monkeypatch.setattr("lightning_ppdl.participant.time.perf_counter", here)
    server = ParameterServer(
        protocol=RoundRobin(), initial=np.zeros(SIZE, np.float32), lease_seconds=10.0, clock=clock
    )
    anna = participant(server)
    local = begin(anna, torch.zeros(SIZE))
    for _ in range(30):
        clock.now = here.now = clock.now + 2
        anna.keep_turn()
    assert anna.end_round(local + 1.0).merged
    local = begin(anna, local)
    clock.now = here.now = clock.now + 11
    anna.keep_turn()
    assert "round 2 will not be merged" in caplog.text
    assert not anna.end_round(local).merged


def test_abandoning_a_round_frees_the_turn_and_the_number() -> None:
    server = ParameterServer(protocol=RoundRobin(), initial=np.zeros(SIZE, np.float32))
    anna, ben = participant(server), participant(server, "ben")
    local = begin(anna, torch.zeros(SIZE))
    anna.abandon_round()
    anna.abandon_round()
    assert not anna.in_round and server.status().awaited == ("ben",)
    play(ben, local, entries(_0=1.0))
    start = begin(anna, local)
    assert anna.round == 1 and start[0] == 1.0
    assert anna.end_round(start + 1.0).merged


def test_a_new_server_is_no_place_for_old_versions(server: ParameterServer) -> None:
    anna = participant(server)
    local = play(anna, torch.zeros(SIZE), torch.ones(SIZE))
    anna.leave()
    fresh = ParameterServer(merge=Add(), initial=np.full(SIZE, 7.0, np.float32))
    other = participant(fresh, "ben")
    play(other, torch.zeros(SIZE), entries(_3=1.0))
    moved = participant(fresh, join=False)
    moved.load_state_dict(anna.state_dict())
    moved.join()
    start = begin(moved, local)
    np.testing.assert_array_equal(start, fresh.parameters())
    assert moved.end_round(start).round == 2


def test_rounds_continue_after_a_restart_without_state(server: ParameterServer) -> None:
    anna = participant(server)
    play(anna, play(anna, torch.zeros(SIZE), torch.ones(SIZE)), torch.ones(SIZE))
    anna.leave()
    reborn = participant(server)
    start = begin(reborn, torch.zeros(SIZE))
    assert start.tolist() == [2.0] * SIZE and reborn.round == 3


def test_a_diverged_round_sends_nothing(server: ParameterServer) -> None:
    anna = participant(server)
    local = begin(anna, torch.zeros(SIZE))
    with pytest.raises(errors.NonFiniteUpdateError):
        anna.end_round(local + float("nan"))
    assert server.version == 0


def test_random_selections_differ_by_round_and_participant_and_repeat() -> None:
    def history(name: str) -> list[Any]:
        server = ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))
        anna = participant(server, name, selection=RandomAboveThreshold(0.5, 0.0))
        result = []
        for _ in range(4):
            before = server.parameters()
            play(anna, torch.zeros(SIZE), torch.ones(SIZE))
            result.append(tuple(np.flatnonzero(server.parameters() - before)))
        return result

    assert len(set(history("anna"))) > 1 and history("anna") == history("anna") != history("ben")
