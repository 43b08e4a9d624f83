"""The synchronous protocol in simulations: real Trainers, virtual time, lost uploads, slow participants."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from simulation_harness import PARTICIPANTS, ROUNDS, SAMPLES, accuracies, run, timeless

from lightning_ppdl.cli import main
from lightning_ppdl.data import Digits, loader
from lightning_ppdl.errors import ParticipantFailedError
from lightning_ppdl.models import Classifier, mlp
from lightning_ppdl.partition import IID
from lightning_ppdl.randomness import derive_seed
from lightning_ppdl.selection import LargestValues
from lightning_ppdl.server.merge import Add, ServerMomentum, ServerOptimizer, StalenessWeighted
from lightning_ppdl.server.protocol import Synchronous
from lightning_ppdl.simulation import SimulationResults

ONE_DIGIT = 1 / 360 + 1e-6
EVERYTHING = LargestValues(1.0)
LR = 0.2


def simulate(**settings: Any) -> SimulationResults:
    settings.setdefault("protocol", Synchronous())
    return run(**settings)


class Counting(Add):
    """Adds, and counts what it is given."""

    def __init__(self) -> None:
        object.__setattr__(self, "staleness", [])

    staleness: list[int]

    def merge(self, update: Any, context: Any) -> Any:
        self.staleness.append(context.staleness)
        return super().merge(update, context)


def test_one_merge_a_round_and_nothing_is_stale() -> None:
    rule = Counting()
    results = simulate(merge=rule)
    assert rule.staleness == [0] * ROUNDS
    assert results.uploads == PARTICIPANTS * ROUNDS and results.staleness_max == 0
    assert len(results.rows) == ROUNDS


def test_the_seed_decides_everything() -> None:
    first, again, other = (
        simulate(
            protocol=Synchronous(quorum=2, deadline_seconds=1.2),
            seed=seed,
            drop_probability=0.2,
            download_fraction=0.5,
        )
        for seed in (3, 3, 4)
    )
    assert timeless(first) == timeless(again) != timeless(other)
    assert first.uploads == again.uploads


def test_speeds_make_no_difference_without_a_deadline() -> None:
    assert accuracies(simulate(speed_spread=0.0)) == accuracies(simulate(speed_spread=0.9))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fedsgd_is_sgd_with_large_batches_on_the_pooled_data(momentum: float) -> None:
    rounds = 60
    sgd = partial(torch.optim.SGD, lr=LR, momentum=momentum)
    results = simulate(
        rounds=rounds,
        round_length=1,
        batch_size=SAMPLES,
        quantity="gradient",
        selection=EVERYTHING,
        merge=ServerOptimizer(sgd),
    )
    splits = Digits().load()
    dealt = IID(SAMPLES).split(splits.train.labels.numpy(), PARTICIPANTS, derive_seed(0, "partition"))
    pooled = splits.train.subset(np.concatenate(dealt))
    (inputs, labels), (tested, truth) = (
        next(iter(loader(part, len(part)))) for part in (pooled, splits.test)
    )
    torch.manual_seed(derive_seed(0, "initial"))
    network = Classifier(mlp((1, 8, 8), 10, hidden=[16]), sgd, 10).network
    optimizer = sgd(network.parameters())
    curve = []
    for _ in range(rounds):
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(network(inputs), labels))
        optimizer.step()
        curve.append(float((network(tested).argmax(1) == truth).float().mean()))
    assert accuracies(results) == pytest.approx(curve, abs=ONE_DIGIT)
    assert curve[-1] > curve[0] + 0.2


def test_fedavg_learns_from_everyone() -> None:
    results = simulate(rounds=60, selection=EVERYTHING, baselines=("standalone",))
    assert results.standalone
    assert results.rows[-1].accuracy > mean(results.standalone.final)


def test_rules_see_the_mean_as_one_update_without_staleness() -> None:
    plain = accuracies(simulate())
    for rule in (
        StalenessWeighted(),
        ServerMomentum(0.0),
        ServerOptimizer(partial(torch.optim.SGD, lr=1.0)),
    ):
        assert accuracies(simulate(merge=rule)) == pytest.approx(plain, abs=ONE_DIGIT), rule
    assert accuracies(simulate(merge=ServerMomentum(0.9), rounds=6)) != accuracies(simulate(rounds=6))


def test_lost_uploads_are_missing_from_the_mean_and_hold_nobody_up() -> None:
    rule = Counting()
    results = simulate(merge=rule, rounds=6, drop_probability=0.4)
    assert 0 < results.uploads < PARTICIPANTS * 6
    assert len(rule.staleness) == len(results.rows) == 6


def test_slow_participants_miss_the_deadline_and_the_others_go_on() -> None:
    rule = Counting()
    patient = simulate(speed_spread=0.9, rounds=4)
    results = simulate(protocol=Synchronous(deadline_seconds=1.5), merge=rule, speed_spread=0.9, rounds=4)
    assert 0 < results.uploads < patient.uploads
    # The fast ones wait for the deadline in each of their rounds, and no longer.
    assert len(results.rows) == 4 and rule.staleness == [0] * 4


def test_a_quorum_that_is_missed_merges_nothing() -> None:
    rule = Counting()
    results = simulate(
        protocol=Synchronous(quorum=1.0, deadline_seconds=1.0), merge=rule, speed_spread=0.9, rounds=2
    )
    assert rule.staleness == [] and len(set(accuracies(results))) == 1


def test_one_participant_is_a_cohort_too() -> None:
    assert accuracies(simulate(participants=1)) == accuracies(run(participants=1))


def test_a_quorum_of_more_than_all_is_refused() -> None:
    with pytest.raises(Exception, match="quorum=5 cannot be reached by 4 members") as caught:
        simulate(protocol=Synchronous(quorum=5))
    assert not isinstance(caught.value, ParticipantFailedError)


@pytest.mark.parametrize(
    "merge",
    [["merge=default"], ["merge=momentum"], ["merge=optimizer", "quantity=gradient", "round_length=1"]],
    ids=lambda overrides: overrides[0],
)
def test_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], merge: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["participants=3", "rounds=3", "partition.samples=20", "model.hidden=[8]", "baselines=[]"]
    deadline = ["protocol.deadline_seconds=1.1", "protocol.quorum=2", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(
        sys, "argv", ["ppdl", "simulate", "protocol=synchronous", *settings, *deadline, *merge]
    )
    assert main() == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["uploads"] and summary["staleness"]["max"] == 0
