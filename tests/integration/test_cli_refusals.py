"""What ``ppdl simulate`` refuses, in one breath: the key, its value, the remedy; and the groups' files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from test_cli import SMALL, Ppdl, ppdl

import lightning_ppdl
from lightning_ppdl import config
from lightning_ppdl.cli.application import build
from lightning_ppdl.cli.simulate import make_simulation
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.selection import Selection
from lightning_ppdl.server.download import DownloadCriterion
from lightning_ppdl.server.merge import MergeRule
from lightning_ppdl.server.protocol import ExchangeProtocol
from lightning_ppdl.simulation import Simulation

__all__ = ["ppdl"]  # a fixture: used by name

CONF = Path(lightning_ppdl.__file__).parent / "conf" / "ppdl"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["selection.fraction=7"], ["selection.fraction=7", "(0, 1]"]),
        (["selection.fraction=0"], ["selection.fraction=0", "(0, 1]"]),
        (["selection.fraction=seven"], ["selection.fraction='seven'", "number"]),
        (["selection.fraction=1e-9"], ["fraction=1e-09", "selects none"]),
        (["upload.bound=-1"], ["bound=-1", "above 0"]),
        (["upload.bound=tight"], ["bound", "tight"]),
        (["download.fraction=1.5"], ["download.fraction=1.5", "(0, 1]"]),
        (["clock.speed_spread=1"], ["speed_spread=1", "[0, 1)"]),
        (["selection.fracton=0.2"], ["selection.fracton=0.2", "did you mean selection.fraction?"]),
        (["particpants=4"], ["particpants=4", "did you mean participants?"]),
        (["clock.speed_spred=0.2"], ["clock.speed_spred=0.2", "did you mean clock.speed_spread?"]),
        (["nonsense=3"], ["nonsense=3", "--cfg job"]),
        (["+selection.foo=2"], ["selection", "foo"]),
        (["+upload.bund=0.001"], ["upload.bund"]),
        (["selection=biggest"], ["selection/biggest", "largest_values"]),
        (["protocol=chaos"], ["protocol/chaos", "round_robin"]),
        (["download.criterion=best"], ["download/criterion/best", "most_recent"]),
        (["experiment=nope"], ["experiment/nope", "digits"]),
        (["rounds=2.5"], ["rounds", "2.5", "Integer"]),
        (["participants=many"], ["participants", "many", "Integer"]),
        (["participants=0"], ["participants=0", "1 or more"]),
        (["round_length=week"], ["round_length='week'", "epoch"]),
        (["baselines=[alone]"], ["'alone'", "standalone"]),
        (["partition.samples=5000"], ["partition.samples=5000", "1437", "lower partition.samples"]),
        (["partition=shards", "partition.samples=7"], ["partition.samples=7", "take 8"]),
        (["optimizer.lr=-1"], ["optimizer", "-1"]),
        (["protocol=null"], ["group", "string"]),
        (["trainer.limit_train_batches=0", "rounds=1"], ["limit_train_batches", "single batch"]),
        (["partition=dirichlet", "partition.alpha=0"], ["simulate: partition.alpha=0"]),
        (["model=cnn"], ["(1, 8, 8)", "model=mlp"]),
        (["data=mnist", "data.root=/nowhere"], ["data.root='/nowhere'"]),
        (["quantity=weights"], ["quantity='weights'", "'change' or 'gradient'"]),
        (["quantity=gradient"], ["quantity='gradient'", "merge=optimizer"]),
        (["quantity=gradient", "merge=add"], ["quantity='gradient'", "merge=optimizer"]),
        (
            ["selection=error_feedback", "selection.fraction=0.1"],
            ["'selection.fraction'", "did you mean selection.selection"],
        ),
        (["selection=error_feedback", "selection.selection.fraction=7"], ["selection.selection.fraction=7"]),
        (["trainer.foo=1"], ["trainer.foo=1"]),
        (["trainer.devices=2"], ["trainer.devices=2", "ppdl join"]),
        (["+trainer.foo=1"], ["trainer.foo=1", "Trainer"]),
        (["+trainer.max_epochs=3"], ["trainer.max_epochs=3", "rounds"]),
        (["trainer.precision=99"], ["trainer", "99", "32-true"]),
        (["rounds"], ["rounds"]),
        (["--bogus"], ["--bogus"]),
    ],
    ids=" ".join,
)
def test_refused_in_one_breath(
    ppdl: Ppdl,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    expected: list[str],
) -> None:
    status = ppdl("simulate", *arguments, "hydra.run.dir=run")
    out, err = capfd.readouterr()
    assert status == 2
    for part in expected:
        assert part in err
    for noise in ("Traceback", "Error executing job", "HYDRA_FULL_ERROR", 'File "'):
        assert noise not in out + err
    assert not list(tmp_path.rglob("metrics.csv"))


def test_a_sweep_with_a_refused_value_says_which(ppdl: Ppdl, capfd: pytest.CaptureFixture[str]) -> None:
    assert ppdl("simulate", "--multirun", *SMALL, "baselines=[]", "selection.fraction=0.5,7") == 2
    out, err = capfd.readouterr()
    assert "selection.fraction=7" in err
    assert "Traceback" not in out + err and "Error executing job" not in out + err


def test_a_traceback_is_there_for_the_asking(
    ppdl: Ppdl, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert ppdl("simulate", "selection.fraction=7") == 2
    assert "Traceback" in capfd.readouterr().err


def test_a_participant_that_fails_is_shown_with_its_traceback(
    ppdl: Ppdl, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        raise ArithmeticError("cannot go on")

    monkeypatch.setattr("lightning_ppdl.models.Classifier.training_step", training_step)
    assert ppdl("simulate", *SMALL, "hydra.run.dir=run") == 1
    err = capfd.readouterr().err
    assert "in training_step" in err and "ArithmeticError: cannot go on" in err
    assert "participant-1" in err.splitlines()[-1]


@pytest.fixture(autouse=True)
def _schemas() -> Iterator[None]:
    config.register()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("lightning_ppdl.conf.ppdl", version_base="1.3"):
        return compose("simulate", overrides=list(overrides))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_makes_a_simulation_and_opens_with_its_command(experiment: str) -> None:
    simulation = make_simulation(composed(f"experiment={experiment}"))
    assert isinstance(simulation, Simulation)
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[1].startswith(f"# ppdl simulate experiment={experiment}")


def test_the_experiment_on_digits_fits_its_data() -> None:
    simulation = make_simulation(composed("experiment=digits"))
    splits = simulation.data.load()
    shares = simulation.partition.split(splits.train.labels.numpy(), simulation.participants, 0)
    assert [len(share) for share in shares] == [50] * 20
    module = simulation.make_module(splits)
    assert module(splits.test.storage[:2].float()).shape == (2, 10)


KINDS: dict[str, Any] = {
    "data": None,
    "features": torch.nn.Module,
    "partition": None,
    "model": partial,
    "optimizer": partial,
    "privacy": Mechanism,
    "selection": Selection,
    "download/criterion": DownloadCriterion,
    "protocol": ExchangeProtocol,
    "merge": MergeRule,
}


@pytest.mark.parametrize(("group", "option"), [(group, name) for group in KINDS for name in options(group)])
def test_every_option_of_every_group_can_be_made(group: str, option: str) -> None:
    made = build(composed(f"{group}={option}"), group.replace("/", "."))
    kind = KINDS[group]
    if option in ("default", "none"):
        assert made is None  # what the protocol or the mechanism brings, or nothing at all
    elif kind is not None:
        assert isinstance(made, kind)
    elif group == "data":
        assert callable(made.load)
    else:
        assert len(made.split(torch.arange(100).numpy() % 2, 5, 0)) == 5
    if group == "model":
        shape = (1, 32, 32)
        assert made(input_shape=shape, classes=10)(torch.zeros(2, *shape)).shape == (2, 10)
    if group == "optimizer":
        assert isinstance(made([torch.nn.Parameter(torch.zeros(1))]), torch.optim.Optimizer)


def test_no_group_of_the_command_is_left_out_here() -> None:
    defaults = composed("hydra.verbose=false").keys()
    chosen = {str(path.parent.relative_to(CONF)) for path in CONF.rglob("*.yaml")} - {".", "experiment"}
    used = {group for group in chosen if group.split("/")[0] in defaults}
    assert used == set(KINDS)
