"""Error feedback in a participant: what got lost is due again, and nothing is sent twice."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from feedback_harness import (
    LOST,
    RAMP,
    SIZE,
    due,
    entries,
    fail,
    participant,
    play,
    server,
)

from lightning_ppdl import errors
from lightning_ppdl.errors import ConfigurationError, ServerUnavailableError
from lightning_ppdl.participant import Participant
from lightning_ppdl.selection import (
    LargestValues,
)
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add
from lightning_ppdl.server.protocol import RoundRobin

__all__ = ["server"]


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
