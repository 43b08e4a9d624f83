"""Where local training starts under error feedback, and what of it is a change."""

from __future__ import annotations

import functools

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

from lightning_ppdl.privacy.residual import Residual
from lightning_ppdl.records import Download, ValueType
from lightning_ppdl.selection import (
    ErrorFeedback,
    LargestValues,
)
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import ServerOptimizer

__all__ = ["server"]


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
