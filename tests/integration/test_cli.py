"""The ``ppdl`` command as a person uses it: help, runs, and what they leave on disk."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from omegaconf import OmegaConf

from lightning_ppdl import __version__
from lightning_ppdl.cli import main
from lightning_ppdl.models import Classifier

PPDL = Path(sys.executable).with_name("ppdl")
SMALL = ["participants=3", "rounds=2", "partition.samples=20", "model.hidden=[8]"]
COLUMNS = ["round", "accuracy", "uploaded_bytes", "downloaded_bytes", "staleness_mean", "seconds"]

Ppdl = Callable[..., int]


@pytest.fixture
def ppdl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ppdl]:
    """Runs the command in this process, in an empty directory, and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ppdl", *arguments])
        return main()

    yield run
    root.handlers[:] = handlers  # Hydra's own write to this test's captured output
    root.setLevel(level)


def read_rows(directory: Path) -> list[dict[str, float]]:
    with (directory / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [{name: float(value) for name, value in row.items()} for row in reader]
        assert reader.fieldnames == COLUMNS
    return rows


def read_summary(directory: Path) -> Any:
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert ppdl(*arguments) == 0
    out = capsys.readouterr().out
    assert "simulate" in out and "usage: ppdl COMMAND" in out


def test_version(ppdl: Ppdl, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppdl("--version") == 0
    assert capsys.readouterr().out == f"ppdl {__version__}\n"


def test_an_unknown_command_is_refused_with_a_suggestion(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl("simulte") == 2
    assert "'simulte'" in (err := capsys.readouterr().err) and "did you mean 'simulate'?" in err
    assert ppdl("xyzzy") == 2
    assert "'xyzzy'" in (err := capsys.readouterr().err) and "ppdl --help" in err


def test_help_imports_neither_torch_nor_lightning() -> None:
    script = (
        "import sys; sys.argv = ['ppdl', '--help']\n"
        "from lightning_ppdl.cli import main\n"
        "assert main() == 0\n"
        "print(sorted({'torch', 'pytorch_lightning'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_help_of_simulate_shows_groups_settings_and_examples(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl("simulate", "--help") == 0
    out = capsys.readouterr().out
    assert "protocol: asynchronous, random_order, round_robin, synchronous" in out
    assert "selection: default, error_feedback, largest_values, per_layer, " in out
    assert "privacy: none, participant, record, sparse_vector" in out
    assert "download/criterion: changed_since, most_recent, most_updated" in out
    assert "ppdl simulate experiment=digits" in out
    assert "drop_probability: 0.0" in out
    assert "schema" not in out


def test_cfg_job_shows_the_configuration_and_runs_nothing(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ppdl("simulate", "--cfg", "job", "experiment=digits", "rounds=7") == 0
    shown: Any = OmegaConf.create(capsys.readouterr().out)
    assert (shown["participants"], shown["rounds"], shown["optimizer"]["lr"]) == (20, 7, 0.2)
    assert "hydra" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spelling", ["download.criterion", "download/criterion"])
def test_a_nested_group_may_be_written_with_a_dot(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    assert ppdl("simulate", "--cfg", "job", f"{spelling}=most_recent") == 0
    shown: Any = OmegaConf.create(capsys.readouterr().out)
    criterion = shown.download.criterion
    assert criterion == {"_target_": "lightning_ppdl.server.download.MostRecent"}


def test_a_run_leaves_a_table_a_summary_and_a_picture(
    ppdl: Ppdl, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "here"
    assert ppdl("simulate", *SMALL, f"hydra.run.dir={run}", "baselines=[standalone]", "seed=5") == 0
    assert {"metrics.csv", "summary.json", "accuracy.png"} <= {path.name for path in run.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    rows, summary = read_rows(run), read_summary(run)
    assert [row["round"] for row in rows] == [1, 2]
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in rows)
    accuracy = summary["accuracy"]
    assert set(accuracy) == {"collaborative", "collaborative_best", "standalone", "centralized"}
    assert accuracy["collaborative"] == pytest.approx(rows[-1]["accuracy"])
    assert accuracy["collaborative_best"] == pytest.approx(max(row["accuracy"] for row in rows))
    alone = accuracy["standalone"]
    assert set(alone) == {"mean", "min", "max"}
    assert 0 <= alone["min"] <= alone["mean"] <= alone["max"] <= 1
    assert accuracy["centralized"] is None
    assert (summary["participants"], summary["uploads"], summary["seed"]) == (3, 6, 5)
    assert summary["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    for name in ("uploaded_bytes", "downloaded_bytes"):
        assert summary[name] == sum(row[name] for row in rows) > 0
    assert summary["staleness"] == {"mean": 0.0, "max": 0}
    assert set(summary["seconds"]) == {"collaborative", "standalone", "centralized"}
    assert summary["seconds"]["collaborative"] > 0 < summary["seconds"]["standalone"]
    assert summary["seconds"]["centralized"] is None
    picture = matplotlib.image.imread(run / "accuracy.png")
    height, width = picture.shape[:2]
    assert 500 <= height <= 2000 and 800 <= width <= 3000
    assert picture[..., :3].std() > 0.01  # something is drawn
    out = capsys.readouterr().out
    assert str(run) in out and "standalone, mean" in out and "not" in out


def test_a_run_that_fails_leaves_no_older_results_in_its_directory(ppdl: Ppdl, tmp_path: Path) -> None:
    arguments = ["simulate", *SMALL, "baselines=[]", "hydra.run.dir=here"]
    assert ppdl(*arguments) == 0
    assert (tmp_path / "here" / "summary.json").exists()
    assert ppdl(*arguments, "partition.samples=100000") == 2
    assert not (tmp_path / "here" / "summary.json").exists()
    assert not (tmp_path / "here" / "metrics.csv").exists()


def test_the_summary_of_a_run_with_the_other_baseline(ppdl: Ppdl, tmp_path: Path) -> None:
    arguments = [*SMALL, "hydra.run.dir=run", "baselines=[centralized]", "protocol=asynchronous"]
    assert ppdl("simulate", *arguments) == 0
    summary = read_summary(tmp_path / "run")
    assert summary["accuracy"]["standalone"] == {"mean": None, "min": None, "max": None}
    assert 0 <= summary["accuracy"]["centralized"] <= 1
    assert summary["staleness"]["max"] >= summary["staleness"]["mean"] > 0
    assert summary["seconds"]["standalone"] is None


def test_settings_reach_the_run(ppdl: Ppdl, tmp_path: Path) -> None:
    base = [*SMALL, "baselines=[]"]
    changes = [[], ["selection.fraction=1.0"], ["upload.bound=0.0001"], ["optimizer=adam"], ["batch_size=5"]]
    rows = []
    for number, change in enumerate(changes):
        assert ppdl("simulate", *base, *change, f"hydra.run.dir={number}") == 0
        rows.append([(r["accuracy"], r["uploaded_bytes"]) for r in read_rows(tmp_path / str(number))])
    assert len({tuple(row) for row in rows}) == len(changes)
    assert rows[1][0][1] > 3 * rows[0][0][1]


def test_a_sweep_runs_every_value(ppdl: Ppdl, tmp_path: Path) -> None:
    assert ppdl("simulate", "--multirun", *SMALL, "baselines=[]", "seed=3,4", "hydra.sweep.dir=sweep") == 0
    summaries = {number: read_summary(tmp_path / "sweep" / number) for number in ("0", "1")}
    assert {number: summary["seed"] for number, summary in summaries.items()} == {"0": 3, "1": 4}


def test_gradients_with_an_optimizer_at_the_server(ppdl: Ppdl, tmp_path: Path) -> None:
    arguments = [*SMALL, "quantity=gradient", "merge=optimizer", "baselines=[]", "hydra.run.dir=run"]
    assert ppdl("simulate", *arguments) == 0
    assert len(read_rows(tmp_path / "run")) == 2


def press_ctrl_c_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, left = Classifier.training_step, [step]

    def training_step(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", training_step)


@pytest.mark.parametrize("step", [3, 3 * 2 * 2 + 3], ids=["collaboration", "baseline"])
def test_ctrl_c_exits_with_130(
    ppdl: Ppdl, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    press_ctrl_c_at(step, monkeypatch)
    assert ppdl("simulate", *SMALL, "baselines=[standalone]", "hydra.run.dir=run") == 130
    err = capfd.readouterr().err
    assert "interrupted" in err and "Traceback" not in err


def test_a_real_process_can_be_interrupted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command: list[str | Path] = [PPDL, "simulate", "rounds=100000", f"hydra.run.dir={run}"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=quiet())
    try:
        deadline = time.monotonic() + 120
        while not (run / ".hydra").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.5)  # into the rounds
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err


def test_a_real_process_succeeds_and_refuses(tmp_path: Path) -> None:
    good: list[str | Path] = [PPDL, "simulate", *SMALL, "baselines=[]", "hydra.run.dir=run"]
    ran = subprocess.run(good, cwd=tmp_path, capture_output=True, text=True, env=quiet(), check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(read_rows(tmp_path / "run")) == 2
    bad: list[str | Path] = [PPDL, "simulate", "selection.fraction=7"]
    ran = subprocess.run(bad, cwd=tmp_path, capture_output=True, text=True, env=quiet(), check=False)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1 and "selection.fraction=7" in ran.stderr


def quiet() -> dict[str, str]:
    """This environment with one thread, and without the switch that shows tracebacks."""
    return {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {"OMP_NUM_THREADS": "1"}
