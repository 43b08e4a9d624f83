"""``ppdl plan`` as a person uses it, and the forecasts below it."""

from __future__ import annotations

import csv
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.image
import pytest

from lightning_ppdl.cli import main
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.planning import Collaboration, forecast
from lightning_ppdl.privacy.accounting import calibrate_noise, total
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.mechanism import Mechanism, Plan
from lightning_ppdl.privacy.noise import NoiseSource
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.privacy.release import Release
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.selection import Selection

PAPER = Collaboration(participants=90, rounds=100, parameters=140_106, records=600, batch_size=10)
Ppdl = Callable[..., int]


@pytest.fixture
def ppdl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ppdl]:
    """Runs ``ppdl plan`` in this process, in an empty directory, and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ppdl", "plan", *arguments, "hydra.run.dir=out"])
        return main()

    yield run
    root.handlers[:] = handlers  # Hydra's own write to this test's captured output
    root.setLevel(level)


def rows() -> list[dict[str, str]]:
    with Path("out/plan.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_papers_budgets_in_a_sweep(ppdl: Ppdl, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["privacy.epsilon=[1,14010]", "rounds=[10,100]", "participants=90", "privacy.variant=paper"]
    assert ppdl("privacy=sparse_vector", *sweep) == 0
    out = capsys.readouterr().out
    table = rows()
    assert [float(row["epsilon"]) for row in table] == [10, 140_100, 100, 1_401_000]
    assert [float(row["per_parameter_epsilon"]) for row in table] == [pytest.approx(1 / 14010), 1] * 2
    assert [row["verdict"] for row in table][::2] == ["hopeless", "hopeless"]
    assert {row["neighbours"] for row in table} == {"any change of one participant's whole data set"}
    assert "1,401,000" in out and "hopeless" in out and "any change of one participant's" in out
    assert out.index("epsilon") < out.index("paper's epsilon")
    assert matplotlib.image.imread("out/plan.png").std() > 0.01


def test_the_noise_that_a_target_needs(ppdl: Ppdl, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppdl("privacy=participant", "privacy.epsilon=[2,8]", "rounds=10", "parameters=1000") == 0
    low, high = rows()
    assert float(low["epsilon"]) <= 2.0 and float(high["epsilon"]) <= 8.0
    assert float(low["noise_multiplier"]) > float(high["noise_multiplier"]) > 0
    assert float(high["replacement_epsilon"]) > 2 * float(high["epsilon"])
    assert (high["delta"], high["second_delta"]) == ("1e-05", "1e-07")
    assert "zero-out" in capsys.readouterr().out


def test_a_single_setting_is_enough(ppdl: Ppdl) -> None:
    assert ppdl("rounds=5", "privacy.epsilon=0.5") == 0
    assert [float(row["epsilon"]) for row in rows()] == [2.5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["privacy=none"], "privacy=none adds no noise"),
        (["privacy.epsilon=-1"], "privacy.epsilon=-1"),
        (["rounds=0"], "rounds=0"),
        (["rounds=[]"], "rounds=[]: give at least one value"),
        (["rond=3"], "did you mean rounds?"),
        (["+rond=3"], "did you mean rounds?"),
        (["batch_size=601"], "batch_size=601 is more than records=600"),
        (["privacy=participant", "privacy.delta=0", "privacy.epsilon=1"], "delta=0"),
    ],
)
def test_a_setting_that_cannot_work(
    ppdl: Ppdl, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ppdl plan: ") and said in error and "Traceback" not in error
    assert not Path("out/plan.csv").exists()


# Forecasts


@dataclass(frozen=True, kw_only=True)
class Steps(Mechanism):
    """Record level, as far as a plan needs it."""

    unit = "record"
    name = "steps"
    epsilon: float
    noise: float = math.nan

    def calibrated(self, plan: Plan) -> Steps:
        assert plan.steps is not None

        def step(noise: float) -> PrivateSteps:
            return replace(self, noise=noise).event(plan)

        return replace(self, noise=calibrate_noise(step, plan.steps, self.epsilon, self.delta))

    def event(self, plan: Plan) -> PrivateSteps:
        assert plan.batch_size is not None and plan.records is not None
        return PrivateSteps(self.noise, plan.batch_size / plan.records, 1.0, steps=1)

    def make_release(self, selection: Selection | None, bound: float | None, noise: NoiseSource) -> Release:
        raise NotImplementedError


def test_record_level_at_the_figures_of_the_prototype() -> None:
    """q 0.2, one step a round, 60 rounds, a linear model on 3,969 features: 94% at epsilon 1."""
    facts = Collaboration(
        participants=90, rounds=60, parameters=39_700, records=600, batch_size=120, steps_per_round=1
    )
    cast = forecast(Steps(epsilon=1.0, delta=1e-5), facts)
    assert cast.noise_multiplier == 5.989
    assert 0.99 < cast.spent.epsilon <= 1.0
    assert cast.replaced > 1.5 * cast.spent.epsilon
    assert cast.upload_ratio == pytest.approx(120 / (5.989 * math.sqrt(39_700)))
    assert cast.verdict == "workable"
    epochs = replace(facts, steps_per_round=None)
    assert epochs.steps == 5
    assert forecast(Steps(epsilon=1.0, delta=1e-5), epochs).spent.epsilon <= 1.0


def test_signal_to_noise_of_the_sparse_vector_mechanism() -> None:
    mechanism = SparseVector(epsilon=14_010.0, variant="paper")
    cast = forecast(mechanism, PAPER)
    assert cast.upload_ratio == pytest.approx(0.001 / (math.sqrt(2) * mechanism.scales(140_106).value))
    assert cast.run_ratio == pytest.approx(cast.upload_ratio * math.sqrt(90 * 100))
    assert cast.verdict == "weak"
    assert forecast(SparseVector(epsilon=1.0, variant="paper"), PAPER).verdict == "hopeless"


def test_more_participants_help_and_more_parameters_harm() -> None:
    mechanism = ParticipantLevel(epsilon=8.0, delta=1e-5)
    facts = replace(PAPER, rounds=10)
    ratio = forecast(mechanism, facts).run_ratio
    assert forecast(mechanism, replace(facts, participants=360)).run_ratio == pytest.approx(2 * ratio)
    assert forecast(mechanism, replace(facts, parameters=4 * 140_106)).run_ratio == pytest.approx(ratio / 2)


def test_a_delta_that_is_too_large_is_said() -> None:
    mechanism = ParticipantLevel(noise_multiplier=10.0, delta=0.02)
    assert "1/90" in forecast(mechanism, PAPER).warning
    assert forecast(mechanism, replace(PAPER, participants=30)).warning == ""


@pytest.mark.parametrize("name", ["participants", "rounds", "parameters", "records", "batch_size"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=0"):
        replace(PAPER, **{name: 0})


# Budgets


def test_a_budget_says_after_how_many_rounds_the_run_ends(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl("privacy.epsilon=0.1", "privacy.max_epsilon=0.3", "rounds=[2,10]") == 0
    assert [row["affordable_rounds"] for row in rows()] == ["2", "3"]
    assert "ends after 3" in capsys.readouterr().out
    assert ppdl("privacy.epsilon=0.1", "privacy.max_epsilon=0.3", "rounds=[2,3]") == 0
    assert "has room for all rounds" in capsys.readouterr().out


def test_a_budget_at_the_level_of_records_counts_whole_rounds(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str]
) -> None:
    record = [
        "privacy=record",
        "privacy.epsilon=null",
        "privacy.noise_multiplier=1.44",
        "batch_size=120",
        "rounds=20",
    ]
    assert ppdl(*record, "privacy.max_epsilon=4") == 0
    (row,) = rows()
    afforded = int(row["affordable_rounds"])
    assert 0 < afforded < 20 and f"ends after {afforded}" in capsys.readouterr().out
    step = PrivateSteps(1.44, 0.2, 1.0, steps=1)
    assert total([step] * 5 * afforded, 1e-5).epsilon <= 4 < total([step] * 5 * (afforded + 1), 1e-5).epsilon


def test_a_target_is_met_by_all_rounds(ppdl: Ppdl, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppdl("privacy=participant", "privacy.epsilon=2", "rounds=10", "parameters=1000") == 0
    assert rows()[0]["affordable_rounds"] == "10" and "ends after" not in capsys.readouterr().out


def test_mechanisms_are_planned_one_by_one(ppdl: Ppdl, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppdl("privacy=[record,participant]") == 2
    assert "the group privacy takes one value" in capsys.readouterr().err


def test_an_epoch_has_as_many_steps_as_the_sampling_rate_makes() -> None:
    """Whatever the loader's batch size says beside it."""
    mechanism = RecordLevel(noise_multiplier=2.0, delta=1e-5, sampling_rate=0.01)
    cast = forecast(mechanism, Collaboration(10, rounds=10, parameters=100, records=600, batch_size=60))
    truth = total([PrivateSteps(2.0, 0.01, 1.0, steps=10 * 100)], 1e-5)
    assert cast.spent.epsilon == pytest.approx(truth.epsilon)
