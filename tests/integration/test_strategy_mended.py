"""What used to go wrong without a word."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from strategy_harness import Tiny, fit, flat, loader, trainer, url
from torch import Tensor, nn

from lightning_ppdl import (
    DSSGDStrategy,
    LargestValues,
    MergeRule,
    ParameterServer,
    RoundRobin,
    Selection,
    close,
    serve,
)
from lightning_ppdl.errors import ConfigurationError, MergeError, SelectionError
from lightning_ppdl.records import SparseUpdate
from lightning_ppdl.server.merge import MergeContext
from lightning_ppdl.server.store import Change

__all__ = ["url"]


def strategy(url: str, **settings: Any) -> DSSGDStrategy:
    return DSSGDStrategy(**{"server": url, "participant": "a", "selection": LargestValues(1.0), **settings})


def test_resuming_against_a_new_server_does_not_throw_the_weights_away(url: str, tmp_path: Any) -> None:
    checkpoint = tmp_path / "last.ckpt"
    first = fit(Tiny(), strategy(url), epochs=2, default_root_dir=tmp_path)
    first.save_checkpoint(checkpoint)
    close(url)
    again = trainer(strategy(url), epochs=4)
    with pytest.raises(ConfigurationError, match=r"continues after round 2.*initial='own'"):
        again.fit(Tiny(), train_dataloaders=loader(), ckpt_path=checkpoint, weights_only=False)
    close(url)
    own = trainer(strategy(url, initial="own"), epochs=2)
    restored = Tiny()
    own.fit(restored, train_dataloaders=loader(), ckpt_path=checkpoint, weights_only=False)
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    torch.testing.assert_close(restored.state_dict()["head.weight"], saved["head.weight"])


class Raw(Tiny):
    """Steps an optimizer that Lightning does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        raw = optimizer.optimizer
        raw.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
        raw.step()


def test_steps_that_lightning_does_not_count_are_shared_all_the_same(url: str) -> None:
    server = serve(url, ParameterServer(protocol=RoundRobin()))
    module = Raw()
    fit(module, strategy(url), epochs=3)
    assert server.status().uploads == 3
    torch.testing.assert_close(torch.from_numpy(server.parameters()), flat(module))


class Unfreezing(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)


def test_parameters_unfrozen_too_late_to_be_shared_are_named(url: str) -> None:
    module = Tiny()
    module.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 parameters, 'backbone.weight' first, became trainable"):
        fit(module, strategy(url), epochs=3, callbacks=[Unfreezing()])


def test_a_second_fit_of_a_changed_module_has_an_optimizer_of_its_parameters(url: str) -> None:
    module, made = Tiny(), strategy(url)
    made_trainer = fit(module, made, epochs=2)
    module.head = nn.Linear(4, 2)
    before = module.head.weight.detach().clone()
    made_trainer.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="made anew"):
        made_trainer.fit(module, train_dataloaders=loader())
    assert not torch.equal(module.head.weight, before)


class Poison(MergeRule):
    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        return Change(update.indices, update.values * np.float32("nan"))


def test_a_merge_rule_that_returns_nan_is_blamed_and_changes_nothing(url: str) -> None:
    server = serve(url, ParameterServer(merge=Poison()))
    with pytest.raises(MergeError, match=r"Poison\.merge\(\)"):
        fit(Tiny(), strategy(url))
    assert np.isfinite(server.parameters()).all()
    assert server.version == 0


class Answering(Selection):
    fraction = 0.1

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return self.answer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.ones(34, dtype=torch.bool), "int64 tensor"),
        (torch.zeros(2, 1, dtype=torch.int64), "int64 tensor"),
        ([1, 2], "int64 tensor"),
        (torch.arange(30), "returned 30 indices"),
        (torch.tensor([2, 1]), "strictly increasing"),
        (torch.tensor([1, 1]), "strictly increasing"),
        (torch.tensor([10**6]), "strictly increasing"),
        (torch.tensor([-1]), "strictly increasing"),
    ],
)
def test_a_selection_that_answers_nonsense_is_named_before_anything_leaves(
    url: str, answer: Any, message: str
) -> None:
    server = serve(url, ParameterServer())
    with pytest.raises(SelectionError, match=rf"Answering\.select\(\).*{message}"):
        fit(Tiny(), strategy(url, selection=Answering(answer)))
    assert server.status().uploads == 0
    assert server.status().rejections == {}


@pytest.mark.parametrize("initial", [None, 1.5, True, -1, 2**70, "OWN", []])
def test_an_initial_that_cannot_be_is_refused_at_once(url: str, initial: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"initial=.*'own'"):
        strategy(url, initial=initial)


class SlowValidation(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.1)


def test_validation_in_the_middle_of_a_round_keeps_the_turn(url: str) -> None:
    server = serve(url, ParameterServer(protocol=RoundRobin(), lease_seconds=0.4))
    validating = trainer(strategy(url), epochs=2, val_check_interval=3, num_sanity_val_steps=0)
    validating.fit(SlowValidation(), loader(), loader())  # six validation batches: 0.6 seconds
    assert server.status().uploads == 2
