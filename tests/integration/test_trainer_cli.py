"""LightningCLI: the strategy by name, by options, and in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning.cli import LightningCLI, SaveConfigCallback
from strategy_harness import Tiny, add_server, flat, loader, one_thread, require_close, rounds, url
from trainer_harness import require_left

from lightning_ppdl import ParameterServer, RoundRobin
from lightning_ppdl.privacy.events import GaussianRound
from lightning_ppdl.privacy.ledger import Ledger

__all__ = ["one_thread", "url"]

CLASS = "lightning_ppdl.DSSGDStrategy"


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(2)


@pytest.fixture
def server(url: str, monkeypatch: pytest.MonkeyPatch) -> ParameterServer:
    """Named, as the participant is, by the environment."""
    monkeypatch.setenv("PPDL_SERVER", url)
    monkeypatch.setenv("PPDL_PARTICIPANT", "anna")
    return add_server(url, protocol=RoundRobin())


def command(*arguments: str, **settings: Any) -> LightningCLI:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    settings.setdefault("save_config_callback", None)
    return LightningCLI(Tiny, Data, trainer_defaults=quiet, args=list(arguments), **settings)


def test_by_name_and_environment(server: ParameterServer) -> None:
    """A tenth of 34 parameters each time, as by default; and evaluation joins nothing."""
    command("validate", "--trainer.strategy=dssgd")
    assert server.status().members == ()
    cli = command("fit", "--trainer.strategy=dssgd")
    assert [report.released_values for report in rounds(cli.trainer)] == [3, 3]
    require_left(server, 2)


def test_by_options(server: ParameterServer) -> None:
    cli = command(
        "fit",
        f"--trainer.strategy={CLASS}",
        "--trainer.strategy.participant=ben",
        "--trainer.strategy.selection=lightning_ppdl.LargestValues",
        "--trainer.strategy.selection.fraction=0.5",
        "--trainer.strategy.bound=0.001",
        "--trainer.strategy.round_length=4",
        "--trainer.strategy.initial=own",
    )
    assert [report.released_values for report in rounds(cli.trainer)] == [17, 17, 17]
    assert all(report.update_norm <= 0.001 * 17**0.5 + 1e-6 for report in rounds(cli.trainer))
    require_left(server, 3, "ben")
    start = flat(Tiny()).numpy()
    assert 0 < abs(server.parameters() - start).max() <= 0.0031


def in_yaml(tmp_path: Path, **init_args: Any) -> str:
    path = tmp_path / "config.yaml"
    config = {"trainer": {"strategy": {"class_path": CLASS, "init_args": init_args}}}
    OmegaConf.save(config, path)
    return f"--config={path}"


@pytest.mark.parametrize(("threshold", "released"), [(1e-6, 5), (10.0, 0)])
def test_in_yaml_with_everything_nested(
    server: ParameterServer, url: str, tmp_path: Path, threshold: float, released: int
) -> None:
    """Half of the head's ten parameters; nothing changes by more than ten."""
    selection = {
        "class_path": "lightning_ppdl.RandomAboveThreshold",
        "init_args": {"fraction": 0.5, "threshold": threshold},
    }
    config = in_yaml(
        tmp_path,
        server=url,
        participant="ben",
        selection=selection,
        bound=0.001,
        share=["head.*"],
        round_length=2,
        download_fraction=0.5,
        transfer_dtype="bfloat16",
        seed=3,
    )
    cli = command("fit", config)
    assert server.status().parameters == 10
    assert [report.released_values for report in rounds(cli.trainer)] == [released] * 6
    require_left(server, 6, "ben")


def test_a_mechanism_in_yaml(server: ParameterServer, tmp_path: Path) -> None:
    privacy = {
        "class_path": "lightning_ppdl.ParticipantLevel",
        "init_args": {"noise_multiplier": 2.0, "delta": 1e-5},
    }
    ledger = tmp_path / "anna.ledger"
    command("fit", in_yaml(tmp_path, privacy=privacy, ledger=str(ledger)))
    with Ledger(ledger) as opened:
        assert opened.events() == [GaussianRound(2.0, clip=1.0, size=34, exact=False)] * 2
    require_left(server, 2)


def test_what_is_saved_of_a_run_repeats_it(server: ParameterServer, url: str, tmp_path: Path) -> None:
    selection = {"class_path": "lightning_ppdl.LargestValues", "init_args": {"fraction": 1.0}}
    config, directory = in_yaml(tmp_path, selection=selection), tmp_path / "saved"
    first = command(
        "fit",
        config,
        f"--trainer.default_root_dir={directory}",
        "--seed_everything=4",
        save_config_callback=SaveConfigCallback,
    )
    again = add_server(f"{url}-again")
    config = f"--config={directory / 'config.yaml'}"
    second = command("fit", config, f"--trainer.strategy.init_args.server={url}-again")
    require_left(again, 2)
    require_close(flat(second.model), flat(first.model))
    require_close(again.parameters(), server.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("selection=lightning_ppdl.LargestValues selection.fraction=7", "fraction=7.0 must be a number in"),
        ("round_length=2.5", "round_length"),
        ("bond=0.1", "bond"),
    ],
)
def test_a_mistake_is_named(
    server: ParameterServer, options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--trainer.strategy.{option}" for option in options.split()]
    with pytest.raises((SystemExit, ValueError)) as refusal:
        command("fit", f"--trainer.strategy={CLASS}", *arguments)
    assert said in str(refusal.value) + capsys.readouterr().err
    assert server.status().members == ()
