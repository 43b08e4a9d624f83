"""How a simulation ends when it cannot go on, and what it leaves behind in the process."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from simulation_harness import PARTICIPANTS, Fit, fits, make, run
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError, NonFiniteUpdateError, ParticipantFailedError
from lightning_ppdl.models import mlp
from lightning_ppdl.partition import IID
from lightning_ppdl.server.protocol import (
    Asynchronous,
    ExchangeProtocol,
    RandomOrder,
    RoundRobin,
    Synchronous,
)
from lightning_ppdl.simulation import simulate

__all__ = ["fits"]  # a fixture: used by name

STEPS_A_ROUND = 3


class Fragile:
    """A model factory whose networks, together, do `what` at a given training step of the whole run."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self.steps_left = step
        self.what = what

    def __call__(self, input_shape: Any, classes: int) -> nn.Module:
        network = mlp(input_shape, classes, hidden=[8])
        network.register_forward_pre_hook(self._count)
        return network

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if network.training:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.what()


def fail_to_train() -> None:
    raise ArithmeticError("this participant cannot go on")


# Taking turns, the fifth step is the second participant's second.
@pytest.mark.parametrize(
    ("protocol", "step", "name"),
    [
        (RoundRobin(), 5, "participant-2"),
        (RoundRobin(), PARTICIPANTS * STEPS_A_ROUND + 1, "participant-1"),
        (RandomOrder(), 5, "participant-"),
        (Asynchronous(), 5, "participant-2"),
        (Synchronous(), PARTICIPANTS * STEPS_A_ROUND + 2, "participant-"),
        (Asynchronous(), PARTICIPANTS * STEPS_A_ROUND + 2, "participant-"),
    ],
)
def test_a_participant_that_raises_ends_the_run_under_its_name(
    fits: list[Fit], protocol: ExchangeProtocol, step: int, name: str
) -> None:
    with pytest.raises(
        ParticipantFailedError, match=f"{name}.*ArithmeticError: this participant cannot"
    ) as caught:
        run(protocol=protocol, model=Fragile(step, fail_to_train))
    cause = caught.value.__cause__
    assert isinstance(cause, ArithmeticError)
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "fail_to_train"
    assert fits and all(fit.ended for fit in fits)


def test_the_others_are_ended_in_the_middle_of_their_work(fits: list[Fit]) -> None:
    with pytest.raises(ParticipantFailedError):
        run(model=Fragile(PARTICIPANTS * STEPS_A_ROUND + 1, fail_to_train))
    assert [fit.ended for fit in fits] == [True] * PARTICIPANTS
    # Everybody had one round, and nobody trained on after the failure.
    assert [fit.trainer.global_step for fit in fits] == [STEPS_A_ROUND] * PARTICIPANTS


def test_after_a_failure_the_next_run_is_as_ever() -> None:
    expected = [row.accuracy for row in run().rows]
    with pytest.raises(ParticipantFailedError):
        run(model=Fragile(5, fail_to_train))
    assert [row.accuracy for row in run().rows] == expected


def test_divergence_is_a_failure_that_says_so() -> None:
    def explode(input_shape: Any, classes: int) -> nn.Module:
        network = mlp(input_shape, classes, hidden=[8])
        network.register_forward_hook(lambda module, inputs, outputs: outputs * float("nan"))
        return network

    with pytest.raises(ParticipantFailedError, match="participant-1") as caught:
        run(model=explode)
    assert isinstance(caught.value.__cause__, NonFiniteUpdateError)


def test_a_failing_baseline_raises_its_own_error() -> None:
    collaboration = PARTICIPANTS * STEPS_A_ROUND
    with pytest.raises(ArithmeticError, match="cannot go on"):
        run(rounds=1, baselines=("standalone",), model=Fragile(collaboration + 2, fail_to_train))


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "protocol", [RoundRobin(), Asynchronous(), Synchronous()], ids=lambda p: type(p).__name__
)
def test_ctrl_c_ends_everyone(fits: list[Fit], protocol: ExchangeProtocol) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(protocol=protocol, model=Fragile(5, press_ctrl_c))
    assert fits and all(fit.ended for fit in fits)


def test_ctrl_c_ends_a_baseline() -> None:
    # Lightning turns it into SystemExit; whoever called simulate() must not see that as a success.
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        run(
            rounds=1, baselines=("standalone",), model=Fragile(PARTICIPANTS * STEPS_A_ROUND + 2, press_ctrl_c)
        )
    assert not isinstance(caught.value, SystemExit) or caught.value.code not in (0, None)


@contextmanager
def settings_of_the_process() -> Iterator[None]:
    """Unusual ones, which must still be there afterwards."""

    def own_handler(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    level = logging.getLogger("pytorch_lightning").level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, own_handler)
    torch.set_num_threads(2)
    logging.getLogger("pytorch_lightning").setLevel(logging.DEBUG)
    try:
        yield
        assert torch.get_num_threads() == 2
        assert [signal.getsignal(number) for number in handlers] == [own_handler, own_handler]
        assert logging.getLogger("pytorch_lightning").level == logging.DEBUG
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        logging.getLogger("pytorch_lightning").setLevel(level)


def test_signal_handlers_threads_and_log_levels_are_put_back() -> None:
    during: list[int] = []
    with settings_of_the_process():
        run(rounds=1, threads=1, model=Fragile(1, lambda: during.append(torch.get_num_threads())))
    assert during == [1]


def test_they_are_put_back_after_a_failure_too() -> None:
    with settings_of_the_process(), pytest.raises(ParticipantFailedError):
        run(model=Fragile(5, fail_to_train))


def test_they_are_put_back_after_ctrl_c_too() -> None:
    with settings_of_the_process(), pytest.raises(KeyboardInterrupt):
        run(model=Fragile(5, press_ctrl_c))


def test_threads_none_leaves_torch_as_it_is() -> None:
    during: list[int] = []
    with settings_of_the_process():
        run(rounds=1, threads=None, model=Fragile(1, lambda: during.append(torch.get_num_threads())))
    assert during == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"participants": 0}, "participants=0"),
        ({"rounds": 2.5}, "rounds=2.5"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"round_length": "week"}, "round_length='week'"),
        ({"speed_spread": 1.0}, "speed_spread=1.0"),
        ({"drop_probability": -0.1}, "drop_probability=-0.1"),
        ({"drop_probability": float("nan")}, "drop_probability=nan"),
        ({"download_fraction": 0.0}, "download.fraction=0.0"),
        ({"bound": 0.0}, "bound=0.0"),
        ({"quantity": "weights"}, "quantity='weights'"),
        ({"threads": 0}, "threads=0"),
        ({"baselines": ("alone",)}, "'alone'.*standalone"),
        ({"trainer": {"max_epochs": 3}}, "trainer.max_epochs=3.*rounds"),
        ({"trainer": {"strategy": "ddp"}}, "trainer.strategy='ddp'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(settings: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**settings)


def test_more_data_than_there_is_is_refused_before_training(fits: list[Fit]) -> None:
    with pytest.raises(ConfigurationError, match=r"4 participants.*1437"):
        simulate(make(rounds=1, partition=IID(1000)))
    assert fits == []
