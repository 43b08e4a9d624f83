"""Lightning's two packages: participants of either, together, and what is said where they are mixed up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as other
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from strategy_harness import Tiny, add_server, everything, flat, loader, require_close, url
from torch import Tensor, nn

import lightning_ppdl
import lightning_ppdl.lightning
from lightning_ppdl import ConfigurationError, LargestValues, Ledger, RecordLevel, RoundRobin
from lightning_ppdl.privacy.noise import SeededNoise

__all__ = ["url"]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Other(other.LightningModule):
    """:class:`Tiny`, of the other package."""

    def __init__(self) -> None:
        super().__init__()
        same = Tiny()
        self.backbone, self.head = same.backbone, same.head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.head(torch.tanh(self.backbone(batch[0])))
        return nn.functional.mse_loss(out, batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, 0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def strategy(url: str, name: str = "anna", **settings: Any) -> Any:
    settings = {"selection": LargestValues(1.0), "initial": "own", **settings}
    return lightning_ppdl.lightning.DSSGDStrategy(url, name, **settings)


def fit(module: Other, strategy: Any, epochs: int = 3, **settings: Any) -> other.Trainer:
    trainer = other.Trainer(strategy=strategy, max_epochs=epochs, **{**QUIET, **settings})
    trainer.fit(module, loader())
    return trainer


def test_a_participant_of_the_other_package_trains_as_one_of_the_first(url: str) -> None:
    server = add_server(url)
    module, plain = Other(), Tiny()
    fit(module, strategy(url))
    pl.Trainer(max_epochs=3, **QUIET).fit(plain, loader())
    require_close(flat(module), flat(plain))
    require_close(server.parameters(), flat(module))
    assert server.status().uploads == 3


def test_participants_of_both_share_one_server(url: str) -> None:
    server = add_server(url, protocol=RoundRobin())
    module, first = Other(), Tiny()
    fit(module, strategy(url), epochs=1)
    pl.Trainer(strategy=everything(url, "ben"), max_epochs=1, **QUIET).fit(first, loader(1))
    assert [member.rounds for member in server.status().members] == [1, 1]
    require_close(server.parameters(), flat(first))


def test_names_stand_for_the_right_class_in_each(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPDL_SERVER", url)
    monkeypatch.setenv("PPDL_PARTICIPANT", "anna")
    theirs = other.Trainer(strategy="dssgd", **QUIET).strategy
    assert type(theirs) is lightning_ppdl.lightning.DSSGDStrategy
    ours = pl.Trainer(strategy="dssgd", **QUIET).strategy
    assert type(ours) is lightning_ppdl.DSSGDStrategy
    several = {**QUIET, "devices": 2}
    assert (
        type(other.Trainer(strategy="dssgd_ddp", **several).strategy)
        is lightning_ppdl.lightning.DSSGDDDPStrategy
    )
    assert type(pl.Trainer(strategy="dssgd_ddp", **several).strategy) is lightning_ppdl.DSSGDDDPStrategy


def test_a_strategy_of_the_wrong_package_names_the_right_import(url: str) -> None:
    wrong: Any = everything(url)
    with pytest.raises(ValueError, match=r"take lightning_ppdl\.lightning\.DSSGDStrategy"):
        other.Trainer(strategy=wrong, **QUIET)
    with pytest.raises(
        ValueError, match=r"for a pytorch_lightning\.Trainer take lightning_ppdl\.DSSGDStrategy"
    ):
        pl.Trainer(strategy=strategy(url), **QUIET)


def test_a_callback_of_the_wrong_package_names_the_right_import(url: str) -> None:
    add_server(url)
    wrong: Any = lightning_ppdl.DSSGDCallback()
    with pytest.raises(ConfigurationError, match=r"take lightning_ppdl\.lightning\.DSSGDCallback"):
        fit(Other(), strategy(url), callbacks=[wrong])
    right = lightning_ppdl.lightning.DSSGDCallback()
    fit(Other(), strategy(url), callbacks=[right])
    assert len(right.reports) == 3


def test_records_are_protected_under_the_other_package_too(url: str) -> None:
    server = add_server(url)
    privacy = RecordLevel(noise_multiplier=1.0, delta=1e-5, clip=1.0)
    private: dict[str, Any] = {
        "selection": None,
        "initial": 0,
        "privacy": privacy,
        "ledger": Ledger(None),
        "noise": SeededNoise(0, "noise", simulated=True),
    }
    with pytest.raises(ConfigurationError, match="EarlyStopping"):
        fit(Other(), strategy(url, **private), callbacks=[EarlyStopping("val_loss")])
    assert server.status().uploads == 0
    ledger = Ledger(None)
    private["ledger"] = ledger
    fit(Other(), strategy(url, **private), epochs=2)
    assert server.status().uploads == 2 and len(ledger.events()) == 2


def test_a_checkpoint_goes_on_under_the_other_package(url: str, tmp_path: Path) -> None:
    server = add_server(url)
    first = pl.Trainer(strategy=everything(url), max_epochs=2, **QUIET)
    first.fit(Tiny(), loader())
    first.save_checkpoint(tmp_path / "pl.ckpt")
    module = Other()
    trainer = other.Trainer(strategy=strategy(url), max_epochs=4, **QUIET)
    trainer.fit(module, loader(), ckpt_path=str(tmp_path / "pl.ckpt"))
    plain = Tiny()
    pl.Trainer(max_epochs=4, **QUIET).fit(plain, loader())
    require_close(flat(module), flat(plain))
    assert server.status().members[0].rounds == 4


def test_neither_package_is_loaded_for_the_other() -> None:
    code = (
        "import sys, lightning_ppdl; lightning_ppdl.{}DSSGDStrategy;"
        "print(*('pytorch_lightning' in sys.modules, 'lightning' in sys.modules))"
    )
    said = [
        subprocess.run([sys.executable, "-c", code.format(home)], capture_output=True, text=True, check=True)
        for home in ("", "lightning.")
    ]
    assert [run.stdout.split() for run in said] == [["True", "False"], ["False", "True"]]
