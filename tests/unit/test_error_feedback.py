"""Error feedback: nothing of an update gets lost, nothing is sent twice, and each participant has its own."""

from __future__ import annotations

import functools
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lightning_ppdl import errors
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.errors import ConfigurationError, NonFiniteUpdateError, ServerUnavailableError
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.privacy.release import PlainRelease, Release
from lightning_ppdl.privacy.residual import Residual
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.records import (
    Download,
    Manifest,
    ParameterSpec,
    Quantity,
    Receipt,
    SparseUpdate,
    ValueType,
)
from lightning_ppdl.selection import (
    ErrorFeedback,
    LargestValues,
    PerLayer,
    RandomAboveThreshold,
    RandomFraction,
    Selection,
)
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add, ServerOptimizer
from lightning_ppdl.server.protocol import RoundRobin

SIZE = 10
SPECS = (ParameterSpec("a", (6,), "float32"), ParameterSpec("b", (4,), "float32"))
FIFTH = ErrorFeedback(LargestValues(0.2), ahead=0.0)
_numbers = itertools.count()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(release: Release) -> Residual:
    assert release.residual is not None
    return release.residual


def send(release: Release, delta: Tensor, seed: int = 0) -> Tensor:
    """Release ``delta`` and send all of it: what was sent, as float32 (P,)."""
    released = release.release(delta, generator(seed))
    update = SparseUpdate("anna", 1, 0, released.indices.numpy(), released.values.numpy())
    kept(release).sent(update)
    sent = torch.zeros_like(delta)
    sent[released.indices] = released.values
    return sent


# Whole numbers, so that sums are exact in float32.
updates = st.integers(1, 5).flatmap(
    lambda rounds: hnp.arrays(np.float32, (rounds, SIZE), elements=st.integers(-9, 9).map(float))
)
selections = st.sampled_from(
    [
        LargestValues(0.1),
        LargestValues(0.5),
        LargestValues(1.0),
        RandomFraction(0.3),
        RandomAboveThreshold(0.4, 2.0),
        PerLayer(LargestValues(0.3)),
        PerLayer(RandomFraction(0.5), {"b": 1.0}),
    ]
)


@given(deltas=updates, selection=selections, bound=st.sampled_from([None, 1.0, 4.0]))
def test_what_was_sent_and_what_is_due_add_up_to_all_updates(
    deltas: Any, selection: Selection, bound: float | None
) -> None:
    release = PlainRelease(ErrorFeedback(selection), bound).for_tensors(SPECS)
    total, sent = torch.zeros(SIZE), torch.zeros(SIZE)
    for seed, delta in enumerate(torch.from_numpy(deltas)):
        given_away = send(release, delta, seed)
        assert int((given_away != 0).sum()) <= release.max_fraction(SIZE) * SIZE + 1e-6
        assert bound is None or float(given_away.abs().max()) <= bound
        total, sent = total + delta, sent + given_away
        due = kept(release).values
        assert due is not None and torch.equal(sent + due, total)


@given(deltas=updates)
@settings(max_examples=30)
def test_entries_are_chosen_from_the_sum(deltas: Any) -> None:
    release = PlainRelease(FIFTH)
    due = torch.zeros(SIZE)
    for delta in torch.from_numpy(deltas):
        before = delta.clone()
        total = due + delta
        expected = PlainRelease(LargestValues(0.2)).release(total, generator())
        released = send(release, delta)
        assert released.nonzero().squeeze(1).tolist() == expected.indices.tolist()
        assert torch.equal(released[expected.indices], expected.values)
        due = total - released
        assert torch.equal(delta, before)


def entries(**changes: float) -> Tensor:
    """A vector of zeros but for e.g. ``_3=1.0``."""
    vector = torch.zeros(SIZE)
    for index, value in changes.items():
        vector[int(index[1:])] = value
    return vector


def test_small_changes_are_sent_once_they_have_added_up() -> None:
    release = PlainRelease(ErrorFeedback(LargestValues(0.1)))
    steady = entries(_3=1.0, _7=0.375)
    sent = [send(release, steady) for _ in range(4)]
    expected = [entries(_3=1.0), entries(_3=1.0), entries(_7=1.125), entries(_3=2.0)]
    assert [one.tolist() for one in sent] == [one.tolist() for one in expected]


def test_what_the_bound_cuts_off_comes_in_instalments() -> None:
    release = PlainRelease(ErrorFeedback(LargestValues(1.0)), bound=1.0)
    sent = [float(send(release, entries(_2=2.5 * (i == 0)))[2]) for i in range(4)]
    assert sent == [1.0, 1.0, 0.5, 0.0]


def test_participants_that_share_a_configuration_share_no_residual() -> None:
    anna, ben = PlainRelease(FIFTH), PlainRelease(FIFTH)
    send(anna, torch.arange(10.0))
    assert kept(ben).values is None
    send(ben, torch.zeros(SIZE))
    assert send(anna, torch.zeros(SIZE)).nonzero().flatten().tolist() == [6, 7]
    assert kept(anna.for_tensors(SPECS)) is not kept(anna)


def test_a_release_that_is_not_sent_changes_nothing() -> None:
    release = PlainRelease(FIFTH)
    send(release, torch.arange(10.0))
    before = kept(release).values
    assert before is not None
    copy = before.clone()
    release.release(torch.ones(SIZE), generator())
    with pytest.raises(NonFiniteUpdateError, match="1 of 10 entries"):
        release.release(entries(_1=float("nan")), generator())
    assert kept(release).values is before and torch.equal(before, copy)


def test_a_sum_that_overflows_is_refused_though_the_update_is_finite() -> None:
    release = PlainRelease(FIFTH)
    send(release, entries(_1=1.0, _2=2e38, _3=3e38, _4=3e38))
    with pytest.raises(NonFiniteUpdateError, match="1 of 10 entries"):
        release.release(entries(_2=2e38), generator())


def test_other_selections_keep_nothing() -> None:
    assert PlainRelease(LargestValues(0.2)).residual is None
    assert PlainRelease(PerLayer(LargestValues(0.2))).residual is None


# ---- within a participant -----------------------------------------------------------------------------


class LossyBackend(MemoryBackend):
    """Answers the next uploads with these errors, before they reach the server (or after it)."""

    failures: list[Exception] = []  # noqa: RUF012
    after = False

    def upload(self, message: bytes) -> Receipt:
        if self.failures and self.after:
            super().upload(message)
        if self.failures:
            raise self.failures.pop(0)
        return super().upload(message)

    def take_turn(self, timeout_seconds: float) -> None:
        if self.failures and str(self.failures[0]) == "no turn":
            raise self.failures.pop(0)
        super().take_turn(timeout_seconds)


def participant(
    server: ParameterServer,
    name: str = "anna",
    selection: Selection = FIFTH,
    bound: float | None = None,
    join: bool = True,
    quantity: Quantity = "change",
    dtype: ValueType = "float32",
    download_fraction: float = 1.0,
) -> Participant:
    release = PlainRelease(selection, bound).for_tensors(SPECS)
    manifest = Manifest(SPECS, quantity, release.max_fraction(SIZE), bound)
    backend = LossyBackend(f"memory://feedback-{next(_numbers)}", server)
    backend.failures = []
    made = Participant(
        name,
        backend,
        manifest,
        release,
        download_fraction,
        turn_timeout_seconds=5.0,
        on_unreachable="local",
        dtype=dtype,
    )
    if join:
        made.join()
    return made


@pytest.fixture
def server() -> ParameterServer:
    return ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))


def fail(member: Participant, *failures: Exception, after: bool = False) -> None:
    backend = member._exchange.backend
    assert isinstance(backend, LossyBackend)
    backend.failures, backend.after = list(failures), after


def play(member: Participant, change: Tensor) -> Tensor:
    """One round whose training adds ``change``; returns where it started."""
    start = member.begin_round(torch.zeros(SIZE))
    assert start is not None
    member.end_round(start + change)
    return start


def due(member: Participant) -> list[float]:
    values = member.state_dict()["release"]
    return [0.0] * SIZE if values is None else values.tolist()


RAMP = torch.arange(10.0)
LOST = [
    errors.UploadLostError("it fell into the sea"),
    errors.TurnNotHeldError("the lease ran out"),
    errors.LateUpdateError("the cycle was closed"),
]


def test_the_server_and_the_residual_have_all_changes_together(server: ParameterServer) -> None:
    anna = participant(server, bound=4.0)
    for scale in (1.0, -2.0, 0.5):
        play(anna, scale * RAMP)
    np.testing.assert_array_equal(server.parameters() + due(anna), -0.5 * RAMP)
    assert np.count_nonzero(server.parameters()) < SIZE


@pytest.mark.parametrize("error", LOST, ids=lambda e: type(e).__name__)
def test_a_lost_update_is_due_again(server: ParameterServer, error: Exception) -> None:
    anna = participant(server, bound=4.0)
    play(anna, RAMP)
    before = due(anna)
    fail(anna, error)
    play(anna, torch.zeros(SIZE))
    assert server.status().uploads == 1
    assert due(anna) == before
    play(anna, torch.zeros(SIZE))
    assert server.status().uploads == 2
    np.testing.assert_array_equal(server.parameters() + due(anna), RAMP)


@pytest.mark.parametrize("after", [False, True])
def test_an_unanswered_update_is_not_due_since_it_is_sent_again(server: ParameterServer, after: bool) -> None:
    anna = participant(server)
    fail(anna, ServerUnavailableError("the cable is out"), after=after)
    play(anna, RAMP)
    assert due(anna) == [*range(8), 0.0, 0.0]
    play(anna, torch.zeros(SIZE))
    assert server.status().uploads == 2
    np.testing.assert_array_equal(server.parameters() + due(anna), RAMP)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("error", LOST, ids=lambda e: type(e).__name__)
def test_what_gets_lost_when_it_is_sent_again_is_due_again(
    server: ParameterServer, error: Exception, restart: bool
) -> None:
    anna = participant(server)
    fail(anna, ServerUnavailableError("the cable is out"))
    play(anna, RAMP)
    if restart:
        state, anna = anna.state_dict(), participant(server, join=False)
        anna.load_state_dict(state)
        anna.join()
    fail(anna, error)
    play(anna, torch.zeros(SIZE))
    assert server.parameters().tolist() == [0.0] * 8 + [8.0, 9.0]
    assert due(anna) == [*range(8), 0.0, 0.0]


def test_what_the_server_may_have_merged_is_not_due_again(server: ParameterServer) -> None:
    anna = participant(server)
    fail(anna, errors.RoundSeenBeforeError("merged already, and a later one"))
    play(anna, RAMP)
    assert due(anna) == [*range(8), 0.0, 0.0]


def test_a_lease_that_ran_out_loses_nothing() -> None:
    now = [0.0]
    server = ParameterServer(
        protocol=RoundRobin(), initial=np.zeros(SIZE, np.float32), lease_seconds=10.0, clock=lambda: now[0]
    )
    anna, ben = participant(server), participant(server, "ben")
    start = anna.begin_round(torch.zeros(SIZE))
    assert start is not None
    now[0] += 11
    play(ben, torch.zeros(SIZE))
    report = anna.end_round(start + RAMP)
    assert report is not None and not report.merged
    assert due(anna) == RAMP.tolist()


def test_rounds_trained_alone_change_nothing(server: ParameterServer) -> None:
    anna = participant(server)
    play(anna, RAMP)
    before = due(anna)
    fail(anna, ServerUnavailableError("no turn"))
    assert anna.begin_round(RAMP) is None
    assert due(anna) == before
    play(anna, torch.zeros(SIZE))
    assert server.parameters().tolist() == [0.0] * 6 + [6.0, 7.0, 8.0, 9.0]


def test_an_upload_that_raises_leaves_the_round_to_be_begun_anew(server: ParameterServer) -> None:
    anna = participant(server)
    fail(anna, OSError("killed"))
    start = anna.begin_round(torch.zeros(SIZE))
    assert start is not None
    with pytest.raises(OSError, match="killed"):
        anna.end_round(start + RAMP)
    assert anna.state_dict()["release"] is None and anna.state_dict()["round"] == 0


def resumed(server: ParameterServer, state: dict[str, Any], **settings: Any) -> Participant:
    """Another process, from what ``torch.save`` wrote."""
    file = io.BytesIO()
    torch.save(state, file)
    made = participant(server, join=False, **settings)
    made.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    made.join()
    return made


def test_the_residual_outlives_its_process_in_the_checkpoint(server: ParameterServer) -> None:
    other = ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))
    anna, twin = participant(server), participant(other)
    for member in (anna, twin):
        play(member, RAMP)
    again = resumed(server, anna.state_dict())
    assert due(again) == [*range(8), 0.0, 0.0]
    for member in (again, twin):
        play(member, 0.5 * RAMP)
    assert due(again) == due(twin) and any(due(again))
    np.testing.assert_array_equal(server.parameters(), other.parameters())


def test_a_state_is_not_changed_by_the_rounds_that_follow(server: ParameterServer) -> None:
    anna = participant(server)
    play(anna, RAMP)
    state = anna.state_dict()["release"]
    before = state.clone()
    fail(anna, LOST[0])
    for _ in range(2):
        play(anna, RAMP)
    assert torch.equal(state, before)


def test_a_checkpoint_without_a_residual_still_loads(server: ParameterServer) -> None:
    anna = participant(server)
    play(anna, RAMP)
    state = anna.state_dict()
    del state["release"]
    again = resumed(server, state)
    assert again.round == 1 and due(again) == [0.0] * SIZE
    plain = participant(server, "ben", selection=LargestValues(0.2))
    play(plain, RAMP)
    assert plain.state_dict()["release"] is None


def test_a_residual_of_another_size_is_refused(server: ParameterServer) -> None:
    anna = participant(server)
    play(anna, RAMP)
    state = {**anna.state_dict(), "release": torch.zeros(12)}
    with pytest.raises(ConfigurationError, match=r"residual of 12 values, .* shares 10 parameters.*share="):
        participant(server, join=False).load_state_dict(state)


def test_without_error_feedback_a_kept_residual_is_dropped_with_a_word(
    server: ParameterServer, caplog: pytest.LogCaptureFixture
) -> None:
    anna = participant(server)
    play(anna, RAMP)
    plain = resumed(server, anna.state_dict(), selection=LargestValues(0.2))
    assert "drops what its checkpoint kept" in caplog.text
    play(plain, torch.zeros(SIZE))
    assert server.parameters().tolist() == [0.0] * 8 + [8.0, 9.0]


def test_what_was_shared_after_the_checkpoint_is_not_sent_twice(
    server: ParameterServer, caplog: pytest.LogCaptureFixture
) -> None:
    anna = participant(server)
    play(anna, RAMP)
    state = anna.state_dict()
    play(anna, torch.zeros(SIZE))
    again = resumed(server, state)
    assert "drops what it had not sent" in caplog.text
    assert again.begin_round(torch.zeros(SIZE)) is None
    play(again, torch.zeros(SIZE))
    assert server.parameters().tolist() == [0.0] * 6 + [6.0, 7.0, 8.0, 9.0]


def test_an_old_unanswered_update_that_was_merged_since_is_not_sent_twice(server: ParameterServer) -> None:
    anna = participant(server)
    fail(anna, ServerUnavailableError("the cable is out"))
    play(anna, RAMP)
    state = anna.state_dict()
    play(anna, torch.zeros(SIZE))
    again = resumed(server, state)
    assert again.begin_round(torch.zeros(SIZE)) is None
    play(again, torch.zeros(SIZE))
    assert server.parameters().tolist() == [0.0] * 6 + [6.0, 7.0, 8.0, 9.0]
    assert due(again) == [0.0] * SIZE


def test_another_server_is_sent_nothing_of_the_old_ones(
    server: ParameterServer, caplog: pytest.LogCaptureFixture
) -> None:
    anna = participant(server)
    play(anna, RAMP)
    fresh = ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))
    moved = resumed(fresh, anna.state_dict())
    assert "is another server" in caplog.text
    play(moved, entries(_1=1.0))
    np.testing.assert_array_equal(fresh.parameters(), entries(_1=1.0))


# ---- starting ahead -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.0])
def test_training_starts_ahead_and_only_its_own_change_counts(server: ParameterServer, ahead: float) -> None:
    anna = participant(server, selection=ErrorFeedback(LargestValues(0.2), ahead))
    assert play(anna, RAMP).tolist() == [0.0] * SIZE
    expected = torch.tensor([*range(8), 0.0, 0.0]) * ahead + torch.tensor([0.0] * 8 + [8.0, 9.0])
    assert play(anna, torch.zeros(SIZE)).tolist() == expected.tolist()
    np.testing.assert_array_equal(server.parameters() + due(anna), RAMP)
    # What the next download is relative to is the server's vector, not where training started.
    assert anna.state_dict()["base"].tolist() == [0.0] * 8 + [8.0, 9.0]


@pytest.mark.parametrize("indices", [None, [1, 4]])
def test_what_was_downloaded_is_left_as_it_is(indices: list[int] | None) -> None:
    residual = Residual(ahead=0.5)
    residual.restore(torch.ones(SIZE), SIZE)
    sent = None if indices is None else np.array(indices)
    download = Download(1, sent, np.zeros(SIZE, np.float32), complete=indices is None)
    downloaded = RAMP.clone()
    start = residual.start_from(downloaded, download)
    assert (start - RAMP).nonzero().flatten().tolist() == (indices or list(range(SIZE)))
    assert torch.equal(downloaded, RAMP)


def test_a_start_that_was_rounded_is_no_change(server: ParameterServer) -> None:
    anna = participant(server, selection=ErrorFeedback(LargestValues(0.2), ahead=0.5))
    play(anna, 1.001 * RAMP)
    start = anna.begin_round(torch.zeros(SIZE))
    assert start is not None
    rounded = start.bfloat16().float()
    assert not torch.equal(rounded, start)
    anna.started_from(rounded)
    anna.end_round(rounded)
    np.testing.assert_array_equal(server.parameters() + due(anna), 1.001 * RAMP)


def test_entries_that_were_not_downloaded_are_ahead_already(server: ParameterServer) -> None:
    anna = participant(server, selection=ErrorFeedback(LargestValues(0.2), ahead=0.5), download_fraction=0.2)
    first = anna.begin_round(torch.zeros(SIZE))
    assert first is not None
    local = first + RAMP
    anna.end_round(local)
    ben = participant(server, "ben", selection=LargestValues(1.0))
    for _ in range(2):
        play(ben, entries(_2=-3.0, _9=-1.0))
    start = anna.begin_round(local)
    assert start is not None
    # Entries 2 and 9 were overwritten by -6 and 9 - 2; of 2 a half of the residual is added.
    assert start.tolist() == [0.0, 1.0, -5.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 7.0]


def test_gradients_are_kept_and_training_does_not_start_ahead() -> None:
    server = ParameterServer(
        merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=0.5)),
        initial=np.zeros(SIZE, np.float32),
    )
    anna = participant(server, selection=ErrorFeedback(LargestValues(0.2), ahead=1.0), quantity="gradient")
    for round_ in range(5):
        start = anna.begin_round(torch.zeros(SIZE))
        assert start is not None
        np.testing.assert_array_equal(start, server.parameters())
        anna.gradients.add_(RAMP * (round_ == 0))
        anna.end_round(start)
    np.testing.assert_array_equal(server.parameters(), -0.5 * RAMP)
    assert due(anna) == [0.0] * SIZE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_for_the_way_took_is_due(server: ParameterServer, dtype: ValueType) -> None:
    anna = participant(server, selection=ErrorFeedback(LargestValues(1.0), ahead=0.0), dtype=dtype)
    change = torch.full((SIZE,), 1 + 2.0**-12)
    play(anna, change)
    assert server.parameters().tolist() == [1.0] * SIZE
    assert due(anna) == [2.0**-12] * SIZE
    play(anna, torch.zeros(SIZE))
    np.testing.assert_array_equal(server.parameters(), change)
    fail(anna, LOST[0])
    play(anna, change)
    assert due(anna) == change.tolist()


# ---- what goes together -------------------------------------------------------------------------------


def make_release(mechanism: Mechanism, selection: Selection) -> Release:
    return mechanism.make_release(selection, None, SeededNoise(0, simulated=True))


@pytest.mark.parametrize("inner", [LargestValues(0.2), RandomFraction(0.2), PerLayer(LargestValues(0.2))])
@pytest.mark.parametrize(
    ("mechanism", "remedy"),
    [
        (ParticipantLevel(noise_multiplier=1.0, delta=1e-5), "give the selection that is inside, or protect"),
        (SparseVector(epsilon=1.0), "leave the selection out"),
    ],
)
def test_refused_where_noise_comes_after_the_residual(
    mechanism: Mechanism, remedy: str, inner: Selection
) -> None:
    with pytest.raises(ConfigurationError, match=remedy) as raised:
        make_release(mechanism, ErrorFeedback(inner))
    assert "selection=ErrorFeedback(" in str(raised.value)


def test_beside_private_steps_the_residual_is_free_and_the_steps_are_paid_once() -> None:
    mechanism = RecordLevel(noise_multiplier=1.0, delta=1e-5, sampling_rate=0.1)
    made = make_release(mechanism, ErrorFeedback(PerLayer(LargestValues(0.5))))
    release = made.for_tensors(SPECS)
    # Whoever counts the steps has the one that was made first.
    made.count_steps(3)  # type: ignore[attr-defined]
    event = release.release(RAMP, generator()).event
    assert getattr(event, "steps", None) == 3
    release.paid()
    assert made.unrecorded == 0
    sent = [send(release, torch.zeros(SIZE) + RAMP * (i == 0)) for i in range(2)]
    assert torch.equal(sent[0] + sent[1], RAMP)
    assert release.release(RAMP, generator()).event is None


class Greedy(LargestValues):
    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return torch.arange(len(delta))


def test_a_selection_that_takes_too_much_is_named() -> None:
    with pytest.raises(errors.SelectionError, match=r"Greedy\.select\(\) returned 10 indices"):
        PlainRelease(ErrorFeedback(Greedy(0.2))).release(RAMP, generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": 0.1}, r"selection=0\.1 must be a Selection"),
        ({"selection": ErrorFeedback()}, "within ErrorFeedback"),
        ({"ahead": -0.1}, r"ahead=-0\.1 must be a number in \[0, 1\]"),
        ({"ahead": 1.1}, r"ahead=1\.1 must"),
        ({"ahead": float("nan")}, "ahead=nan must"),
        ({"ahead": True}, "ahead=True must"),
        ({"ahead": "1"}, "ahead='1' must"),
    ],
)
def test_what_cannot_work_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ErrorFeedback(**arguments)
