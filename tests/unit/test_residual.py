"""What error feedback keeps: nothing of an update gets lost, and each release has its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from feedback_harness import (
    FIFTH,
    RAMP,
    SIZE,
    SPECS,
    entries,
    generator,
    kept,
    send,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lightning_ppdl import errors
from lightning_ppdl.errors import ConfigurationError, NonFiniteUpdateError
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.privacy.release import PlainRelease, Release
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.selection import (
    ErrorFeedback,
    LargestValues,
    PerLayer,
    RandomAboveThreshold,
    RandomFraction,
    Selection,
)

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
