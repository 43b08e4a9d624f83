"""The cost in bytes as a torchmetrics metric: what is counted, once, over resets, checkpoints and ranks."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import matplotlib
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_ppdl import CommunicationCost, ConfigurationError
from lightning_ppdl.round_report import RoundReport

matplotlib.use("Agg")

FIRST = RoundReport(
    round=1,
    merged=True,
    uploaded_bytes=10,
    downloaded_bytes=200,
    released_values=3,
    uploaded_fraction=0.1,
    clamped_fraction=0.0,
    staleness=0,
    update_norm=1.0,
    exchange_seconds=0.25,
    wait_seconds=0.5,
)
SECOND = replace(FIRST, round=2, uploaded_bytes=3000, downloaded_bytes=40_000, merged=False)


@pytest.mark.parametrize(
    ("direction", "expected"), [("both", 43_210), ("upload", 3010), ("download", 40_200)]
)
def test_both_directions_or_one(direction: Any, expected: int) -> None:
    cost = CommunicationCost(direction)
    cost.update([FIRST, SECOND])
    assert cost.compute().shape == ()
    assert int(cost.compute()) == int(cost.total) == expected


@pytest.mark.parametrize(
    ("unit", "expected"), [("byte", 43_210), ("kB", 43.21), ("MB", 0.04321), ("GB", 4.321e-5)]
)
def test_units(unit: Any, expected: float) -> None:
    cost = CommunicationCost(unit=unit)
    cost.update([FIRST, SECOND])
    assert float(cost.compute()) == pytest.approx(expected)
    assert float(cost.total) == pytest.approx(expected)


def test_bytes_stay_whole_where_float32_would_round() -> None:
    cost = CommunicationCost("upload")
    cost.update(replace(FIRST, uploaded_bytes=2**24))
    cost.update(SECOND)
    cost.update(replace(FIRST, uploaded_bytes=1))
    assert int(cost.compute()) == 2**24 + 3001


def test_a_round_is_counted_once_however_often_it_is_handed_over() -> None:
    cost = CommunicationCost()
    cost.update(FIRST)
    cost.update([FIRST])
    cost.update((FIRST, SECOND))
    cost.update([FIRST, SECOND])
    cost.update(FIRST)
    assert int(cost.compute()) == 43_210
    cost.update(())
    assert int(cost.compute()) == 43_210


def test_another_collaboration_numbers_its_rounds_anew_and_is_counted_too() -> None:
    cost = CommunicationCost()
    cost.update([FIRST, SECOND])
    cost.update([replace(FIRST, exchange_seconds=0.26)])
    assert int(cost.compute()) == 43_210 + 210


def test_after_a_reset_counted_rounds_stay_counted() -> None:
    cost = CommunicationCost()
    cost.update([FIRST])
    cost.reset()
    cost.update([FIRST])
    assert int(cost.compute()) == 0
    cost.update([FIRST, SECOND])
    assert int(cost.compute()) == 43_000
    assert int(cost.total) == 43_210


def test_forward_gives_what_is_new_and_goes_on_adding() -> None:
    cost = CommunicationCost()
    assert int(cost([FIRST])) == 210
    assert int(cost([FIRST, SECOND])) == 43_000
    assert int(cost.compute()) == int(cost.total) == 43_210


class Owner(nn.Module):
    def __init__(self, owns: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        if owns:
            self.cost = CommunicationCost()


def test_a_checkpoint_keeps_both_values_and_what_was_counted() -> None:
    saved = Owner()
    saved.cost.update([FIRST])
    saved.cost.reset()
    saved.cost.update([SECOND])
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed = Owner()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert int(resumed.cost.compute()) == 43_000
    assert int(resumed.cost.total) == 43_210
    resumed.cost.update([FIRST, SECOND, replace(FIRST, round=3)])
    assert int(resumed.cost.total) == 43_420


def test_going_back_to_a_checkpoint_counts_the_rounds_after_it_again() -> None:
    owner = Owner()
    owner.cost.update([FIRST])
    checkpoint = copy.deepcopy(owner.state_dict())
    owner.cost.update([FIRST, SECOND])
    owner.load_state_dict(checkpoint)
    assert int(owner.cost.total) == 210
    owner.cost.update([FIRST, SECOND])
    assert int(owner.cost.compute()) == int(owner.cost.total) == 43_210


def test_a_checkpoint_from_before_the_module_had_the_metric_still_loads() -> None:
    owner = Owner()
    owner.cost.update(FIRST)
    owner.load_state_dict(Owner(owns=False).state_dict())
    assert int(owner.cost.total) == 210
    with pytest.raises(RuntimeError, match=r"layer\.bias"):
        owner.load_state_dict({"layer.weight": torch.zeros(1, 2)})


def test_it_is_nothing_that_a_module_shares() -> None:
    cost = CommunicationCost()
    cost.update(FIRST)
    assert [*cost.parameters(), *cost.buffers()] == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cost: pickle.loads(pickle.dumps(cost))])
def test_copies_go_on_by_themselves(copied: Any) -> None:
    cost = CommunicationCost()
    cost.update(FIRST)
    other = copied(cost)
    other.update([FIRST, SECOND])
    assert (int(cost.total), int(other.total)) == (210, 43_210)
    assert (int(cost.compute()), int(other.compute())) == (210, 43_210)


def gathered_from_two_ranks(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Of rank zero, and of one that has no reports."""
    return [tensor, torch.zeros_like(tensor)]


def test_ranks_are_summed() -> None:
    cost = CommunicationCost(dist_sync_fn=gathered_from_two_ranks, distributed_available_fn=lambda: True)
    cost.update([FIRST, SECOND])
    assert int(cost.compute()) == 43_210
    other = CommunicationCost(
        dist_sync_fn=lambda tensor, group=None: [tensor, tensor + 7], distributed_available_fn=lambda: True
    )
    other.update([])
    assert int(other.compute()) == 14
    other.update(FIRST)
    assert int(other.compute()) == 2 * 210 + 14


def test_merging_adds_another_ones_cost() -> None:
    cost, other = CommunicationCost(), CommunicationCost()
    cost.update(FIRST)
    other.update(SECOND)
    cost.merge_state(other)
    cost.update([FIRST, SECOND])
    assert int(cost.compute()) == int(cost.total) == 43_210


def test_in_a_collection() -> None:
    costs = MetricCollection(
        {"up": CommunicationCost("upload"), "down": CommunicationCost("download", unit="kB")}
    )
    costs.update([])
    costs.update([FIRST])
    costs.update([FIRST, SECOND])
    values = costs.compute()
    assert int(values["up"]) == 3010
    assert float(values["down"]) == pytest.approx(40.2)
    costs.reset()
    costs.update([FIRST, SECOND])
    assert int(costs.compute()["up"]) == 0
    for cost, expected in ((costs["up"], 3010), (costs["down"], 40.2)):
        assert isinstance(cost, CommunicationCost)
        assert float(cost.total) == pytest.approx(expected)


def test_plot() -> None:
    cost = CommunicationCost()
    cost.update([FIRST, SECOND])
    _, axes = cost.plot()
    drawn = [line.get_ydata()[0] for line in axes.lines]
    assert 43_210 in [int(y) for y in drawn]
    _, axes = cost.plot([torch.tensor(5), torch.tensor(8)])
    assert [int(y) for y in axes.lines[0].get_ydata()] == [5, 8]


def test_conventions() -> None:
    cost = CommunicationCost()
    assert cost.higher_is_better is cost.full_state_update is cost.is_differentiable is False


@pytest.mark.parametrize("arguments", [{"direction": "up"}, {"unit": "bytes"}, {"direction": None}])
def test_arguments_that_cannot_work(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value!r} must be "):
        CommunicationCost(**arguments)


@pytest.mark.parametrize("reports", [None, 3, [FIRST, 210], "all"])
def test_what_are_no_reports(reports: Any) -> None:
    cost = CommunicationCost()
    with pytest.raises(ConfigurationError, match=r"reports=.*trainer\.strategy\.reports"):
        cost.update(reports)
    assert int(cost.total) == 0
