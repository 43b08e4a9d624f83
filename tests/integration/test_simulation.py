"""Simulations: reproducible, faithful to their settings, and equal to what can be computed without them."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from statistics import mean
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from simulation_harness import (
    BATCH,
    PARTICIPANTS,
    ROUNDS,
    SAMPLES,
    Fit,
    accuracies,
    fits,
    make,
    run,
    timeless,
)
from torch import nn

from lightning_ppdl.data import Digits, loader
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.models import Classifier, mlp
from lightning_ppdl.partition import IID
from lightning_ppdl.randomness import derive_seed, torch_generator
from lightning_ppdl.selection import LargestValues
from lightning_ppdl.server.download import ChangedSince, DownloadCriterion, MostRecent, MostUpdated
from lightning_ppdl.server.merge import Add, ServerMomentum, ServerOptimizer, StalenessWeighted
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol, RandomOrder, RoundRobin
from lightning_ppdl.simulation import simulate

__all__ = ["fits"]  # a fixture: used by name

ALL = 1.0
EVERYTHING = LargestValues(ALL)
DIGITS_TESTED = 360
ONE_DIGIT = 1 / DIGITS_TESTED + 1e-6


@pytest.mark.parametrize(
    "protocol", [RoundRobin(), RandomOrder(), Asynchronous()], ids=lambda p: type(p).__name__
)
def test_the_seed_decides_everything(protocol: ExchangeProtocol) -> None:
    first, again, other = (
        run(protocol=protocol, seed=seed, drop_probability=0.2, download_fraction=0.5) for seed in (3, 3, 4)
    )
    assert timeless(first) == timeless(again)
    assert (first.uploads, first.staleness_mean) == (again.uploads, again.staleness_mean)
    assert timeless(first) != timeless(other)


def test_the_protocols_are_not_one_and_the_same() -> None:
    runs = [timeless(run(protocol=protocol)) for protocol in (RoundRobin(), RandomOrder(), Asynchronous())]
    assert all(one != other for one, other in combinations(runs, 2))


def test_baselines_follow_from_the_seed() -> None:
    first, again, other = (run(baselines=("standalone", "centralized"), seed=seed) for seed in (3, 3, 4))
    assert first.standalone and again.standalone and other.standalone
    assert first.centralized and again.centralized and other.centralized
    assert first.standalone.accuracies == again.standalone.accuracies != other.standalone.accuracies
    assert first.centralized.accuracies == again.centralized.accuracies != other.centralized.accuracies


def test_the_global_generator_is_left_where_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(rounds=1, baselines=("standalone", "centralized"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("protocol", [RoundRobin(), RandomOrder()], ids=lambda p: type(p).__name__)
def test_nothing_is_stale_where_participants_take_turns(protocol: ExchangeProtocol) -> None:
    results = run(protocol=protocol)
    assert [row.staleness_mean for row in results.rows] == [0.0] * ROUNDS
    assert results.staleness_max == 0
    assert results.uploads == PARTICIPANTS * ROUNDS


def test_asynchronous_participants_of_equal_speed_miss_each_other_once() -> None:
    # In the first round all start from version 0 and upload one after the other: 0, 1, 2, 3 missed;
    # from then on everyone misses the three others.
    results = run(protocol=Asynchronous(), speed_spread=0.0)
    assert [row.staleness_mean for row in results.rows] == [1.5, 3.0, 3.0]
    assert results.staleness_max == 3


def test_a_slow_asynchronous_participant_misses_more() -> None:
    results = run(protocol=Asynchronous(), speed_spread=0.9, rounds=4)
    assert results.staleness_max > PARTICIPANTS - 1
    assert timeless(results) != timeless(run(protocol=Asynchronous(), speed_spread=0.0, rounds=4))


@pytest.mark.parametrize("protocol", [RoundRobin(), Asynchronous()], ids=lambda p: type(p).__name__)
def test_lost_uploads_are_not_counted(protocol: ExchangeProtocol) -> None:
    complete = run(protocol=protocol, rounds=6)
    lossy = run(protocol=protocol, rounds=6, drop_probability=0.4)
    assert complete.uploads == PARTICIPANTS * 6
    assert 0 < lossy.uploads < complete.uploads
    assert len(lossy.rows) == 6

    def bytes_each(results: Any) -> float:
        return float(sum(row.uploaded_bytes for row in results.rows) / results.uploads)

    assert bytes_each(lossy) == pytest.approx(bytes_each(complete), rel=0.02)


def test_rounds_of_n_steps(fits: list[Fit]) -> None:
    results = run(round_length=2, rounds=4, baselines=("standalone", "centralized"))
    assert len(results.rows) == 4
    assert results.uploads == PARTICIPANTS * 4
    steps = [fit.trainer.global_step for fit in fits]
    assert steps == [2 * 4] * 2 * PARTICIPANTS + [2 * 4 * PARTICIPANTS]
    assert results.standalone and results.centralized
    assert [len(curve) for curve in results.standalone.accuracies] == [4] * PARTICIPANTS
    assert [len(curve) for curve in results.centralized.accuracies] == [4]


def test_the_data_is_held_once(fits: list[Fit]) -> None:
    run(rounds=1, baselines=("standalone", "centralized"))
    sets = [fit.batches.dataset for fit in fits]
    assert [len(part) for part in sets] == [SAMPLES] * 2 * PARTICIPANTS + [SAMPLES * PARTICIPANTS]
    assert len({part.storage.data_ptr() for part in sets}) == 1


def test_progress_adds_up_to_the_work_announced() -> None:
    simulation = make(baselines=("standalone", "centralized"), drop_probability=0.3)
    told: list[tuple[int, str]] = []
    simulate(simulation, lambda done, line: told.append((done, line)))
    assert sum(done for done, _ in told) == simulation.work == 3 * PARTICIPANTS * ROUNDS
    assert all(line for _, line in told)


def plain_curve(part: Any, name: str, splits: Any) -> list[float]:
    """Accuracy after each epoch of an ordinary Trainer with an ordinary strategy and validation."""
    torch.manual_seed(derive_seed(0, "initial"))
    module = Classifier(mlp((1, 8, 8), 10, hidden=[16]), partial(torch.optim.SGD, lr=0.2), 10)
    curve: list[float] = []
    record = pl.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, _: curve.append(float(trainer.callback_metrics["val_accuracy"]))
    )
    trainer = pl.Trainer(
        max_epochs=ROUNDS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[record],
    )
    batches = loader(part, BATCH, shuffle=True, generator=torch_generator(0, name, "shuffle"))
    trainer.fit(module, batches, loader(splits.test, 100))
    return curve


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_baselines_are_plain_trainers() -> None:
    results = run(baselines=("standalone", "centralized"))
    splits = Digits().load()
    dealt = IID(SAMPLES).split(splits.train.labels.numpy(), PARTICIPANTS, derive_seed(0, "partition"))
    expected = [
        plain_curve(splits.train.subset(rows), f"participant-{number}", splits)
        for number, rows in enumerate(dealt, start=1)
    ]
    assert results.standalone and results.centralized
    for curve, plain in zip(results.standalone.accuracies, expected, strict=True):
        assert curve == pytest.approx(plain, abs=1e-6)
    pooled = splits.train.subset([row for rows in dealt for row in rows.tolist()])
    assert results.centralized.accuracies[0] == pytest.approx(
        plain_curve(pooled, "centralized", splits), abs=1e-6
    )


def test_a_collaboration_of_one_that_shares_everything_is_that_one_alone() -> None:
    results = run(participants=1, rounds=6, selection=EVERYTHING, baselines=("standalone",))
    assert results.standalone
    assert accuracies(results) == pytest.approx(results.standalone.accuracies[0], abs=ONE_DIGIT)


def test_gradients_of_one_step_with_sgd_at_the_server_are_sgd() -> None:
    results = run(
        participants=1,
        rounds=12,
        round_length=1,
        quantity="gradient",
        selection=EVERYTHING,
        merge=ServerOptimizer(partial(torch.optim.SGD, lr=0.2)),
        baselines=("standalone",),
    )
    assert results.standalone
    assert accuracies(results) == pytest.approx(results.standalone.accuracies[0], abs=ONE_DIGIT)
    assert accuracies(results)[-1] != accuracies(results)[0]


def test_gradients_of_many_participants_train_the_server() -> None:
    merge = ServerOptimizer(partial(torch.optim.SGD, lr=0.2))
    results = run(quantity="gradient", merge=merge, selection=EVERYTHING, rounds=8, seed=1)
    assert accuracies(results)[-1] > 0.6


@pytest.mark.parametrize("merge", [None, Add(), ServerMomentum()], ids=lambda m: type(m).__name__)
def test_gradients_need_a_server_with_an_optimizer(merge: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"quantity='gradient'.*(ServerOptimizer|merge=optimizer)"):
        run(quantity="gradient", merge=merge)


def test_a_partial_download_costs_its_fraction() -> None:
    size = run(rounds=1).parameters
    criteria: list[DownloadCriterion] = [MostUpdated(), MostUpdated(0.9), MostRecent(), ChangedSince()]
    runs = [run(criterion=criterion, download_fraction=0.2, rounds=6) for criterion in criteria]
    for results in runs:
        first, *later = results.rows
        assert first.downloaded_bytes > PARTICIPANTS * 4 * size * 0.8  # everything, so that all start alike
        # Four bytes a value, at most two an index, and a header.
        assert all(row.downloaded_bytes < PARTICIPANTS * (6 * 0.2 * size + 100) for row in later)
        assert results.rows[-1].accuracy > 0.4
    assert all(timeless(one) != timeless(other) for one, other in combinations(runs, 2))


def test_merge_rules_that_agree_by_definition_agree() -> None:
    plain = accuracies(run(merge=Add()))
    rules = [
        None,  # round robin's default
        StalenessWeighted(),  # nothing is stale
        ServerMomentum(0.0),
        ServerOptimizer(partial(torch.optim.SGD, lr=1.0)),
    ]
    for rule in rules:
        assert accuracies(run(merge=rule)) == pytest.approx(plain, abs=ONE_DIGIT), rule


def test_merge_rules_differ_where_updates_are_stale() -> None:
    rules = [Add(), StalenessWeighted(), StalenessWeighted(0.5), ServerMomentum(0.5)]
    runs = [timeless(run(protocol=Asynchronous(), merge=rule)) for rule in rules]
    assert all(one != other for one, other in combinations(runs, 2))
    default = timeless(run(protocol=Asynchronous()))
    assert default == timeless(run(protocol=Asynchronous(), merge=Asynchronous().default_merge()))
    assert default != runs[0]


def normalised(input_shape: Any, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes)
    )


def test_a_network_with_batch_norm_is_measured_with_statistics_that_fit_its_parameters() -> None:
    alone = run(participants=1, model=normalised, selection=EVERYTHING, rounds=10, baselines=("standalone",))
    assert alone.standalone
    assert accuracies(alone) == pytest.approx(alone.standalone.accuracies[0], abs=0.02)


def test_a_network_with_batch_norm_learns() -> None:
    results = run(model=normalised, selection=EVERYTHING, rounds=10, baselines=("standalone",))
    assert results.standalone
    assert results.rows[-1].accuracy > mean(results.standalone.final)


def test_collaborating_beats_being_alone_on_digits() -> None:
    results = run(
        participants=8, partition=IID(50), rounds=10, batch_size=5, baselines=("standalone", "centralized")
    )
    assert results.standalone and results.centralized
    assert results.rows[-1].accuracy > mean(results.standalone.final) + 0.1
    assert results.rows[-1].accuracy > max(results.standalone.final)
    assert results.rows[-1].accuracy > results.centralized.final[0] - 0.05


def test_a_bound_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[torch.Tensor] = []

    class Recording(Add):
        def merge(self, update: Any, context: Any) -> Any:
            changes.append(torch.from_numpy(update.values))
            return super().merge(update, context)

    run(bound=0.001, merge=Recording())
    assert len(changes) == PARTICIPANTS * ROUNDS
    assert max(float(values.abs().max()) for values in changes) == pytest.approx(0.001)
