"""When rounds begin and end inside a Trainer, and what of the module they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.tuner.tuning import Tuner
from strategy_harness import (
    BATCHES,
    Tiny,
    add_server,
    everything,
    fit,
    flat,
    loader,
    momenta,
    require_close,
    rounds,
    trainer,
    url,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_ppdl import DSSGDStrategy, LargestValues, RoundRobin, ServerOptimizer
from lightning_ppdl.errors import ConfigurationError, FingerprintMismatchError, NonFiniteUpdateError

__all__ = ["url"]


class Steps(Callback):
    """The step at which each round ended, read off the server's version."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.ends: list[int] = []

    def _look(self, trainer: pl.Trainer) -> None:
        while len(self.ends) < self.server.version:
            self.ends.append(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._look(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._look(trainer)


class Skipping(Tiny):
    """Skips the rest of an epoch from batch ``at[epoch]`` on."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at = at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.at[self.current_epoch] else None


@pytest.mark.parametrize(
    ("round_length", "module", "settings", "ends"),
    [
        ("epoch", Tiny(), {}, [6, 12]),
        (5, Tiny(), {}, [5, 10, 12]),
        (4, Tiny(), {}, [4, 8, 12]),
        (100, Tiny(), {}, [12]),
        (1, Tiny(), {"accumulate_grad_batches": 4}, [1, 2, 3, 4]),
        ("epoch", Tiny(), {"accumulate_grad_batches": 4}, [2, 4]),
        ("epoch", Tiny(), {"max_steps": 8}, [6, 8]),
        (5, Tiny(), {"max_steps": 8}, [5, 8]),
        ("epoch", Tiny(), {"limit_train_batches": 2}, [2, 4]),
        ("epoch", Tiny(), {"limit_train_batches": 0.5}, [3, 6]),
        ("epoch", Tiny(), {"fast_dev_run": 3}, [3]),
        ("epoch", Skipping(3, 2), {}, [3, 5]),
        ("epoch", Skipping(0, 2), {}, [2]),
        ("epoch", Skipping(0, 0), {}, []),
        (5, Skipping(3, 9), {}, [5, 9]),
    ],
)
def test_where_rounds_end(
    url: str, round_length: Any, module: Tiny, settings: dict[str, Any], ends: list[int]
) -> None:
    server = add_server(url, protocol=RoundRobin())
    steps = Steps(server)
    module = type(module)(*getattr(module, "at", ()))
    made = fit(module, everything(url, round_length=round_length), epochs=2, callbacks=[steps], **settings)
    assert steps.ends == ends
    assert [report.round for report in rounds(made)] == list(range(1, len(ends) + 1))
    require_close(server.parameters(), flat(module))
    assert not server.status().members[0].present and server.status().awaited == ()


class Stream(IterableDataset[Any]):
    """Does not know how long it is."""

    def __iter__(self) -> Iterator[Any]:
        stream = torch.Generator().manual_seed(0)
        for _ in range(7):
            x = torch.randn(5, generator=stream)
            yield x, x[:2]


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}])
def test_data_of_unknown_length(url: str, settings: dict[str, Any]) -> None:
    server, module = add_server(url), Tiny()
    made = trainer(everything(url), epochs=2, **settings)
    data: DataLoader[Any] = DataLoader(Stream(), batch_size=2)
    made.fit(module, data, loader(2))
    assert len(rounds(made)) == 2 and made.global_step == 8
    require_close(server.parameters(), flat(module))


def test_early_stopping_ends_the_last_round(url: str) -> None:
    server, module = add_server(url), Tiny()
    stop = EarlyStopping("val_loss", patience=1, stopping_threshold=10.0)
    made = trainer(everything(url), epochs=5, callbacks=[stop])
    made.fit(module, loader(), loader(2))
    assert made.current_epoch < 5 and len(rounds(made)) == made.current_epoch
    require_close(server.parameters(), flat(module))


def test_only_what_is_trained_is_shared(url: str) -> None:
    server, module = add_server(url), Tiny()
    module.backbone.requires_grad_(False)
    before = module.backbone.weight.clone()
    fit(module, everything(url))
    assert server.status().parameters == 10
    assert torch.equal(module.backbone.weight, before)
    require_close(server.parameters(), torch.cat([p.detach().reshape(-1) for p in module.head.parameters()]))


@pytest.mark.parametrize("share", ["head.*", ["head.*"], lambda name, parameter: "head" in name])
def test_a_shared_head_and_local_backbones(url: str, share: Any) -> None:
    server, anna, ben = add_server(url), Tiny(), Tiny()
    fit(anna, everything(url, share=share))
    local = anna.backbone.weight.clone()
    shared = server.parameters()
    made = trainer(everything(url, "ben", share=share), epochs=1)
    made.fit(ben, loader(3))
    assert server.status().parameters == 10
    assert not torch.equal(ben.backbone.weight, local)
    change = torch.cat([p.detach().reshape(-1) for p in ben.head.parameters()]) - torch.from_numpy(shared)
    require_close(server.parameters(), shared + change.numpy())
    assert rounds(made)[0].update_norm == pytest.approx(float(change.norm()), rel=1e-3)


class Normed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def test_buffers_on_request(url: str) -> None:
    server, module = add_server(url), Normed()
    fit(module, everything(url, share="norm.*", share_buffers="*.running_*"))
    assert module.norm.running_mean is not None and module.norm.running_var is not None
    expected = [module.norm.weight, module.norm.bias, module.norm.running_mean, module.norm.running_var]
    require_close(server.parameters(), torch.cat([t.detach() for t in expected]))


class Rivals(Tiny):
    """Two optimizers, stepped by hand, the second every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        both: Any = self.optimizers()
        for optimizer in both[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.backbone.parameters(), 0.1),
            torch.optim.SGD(self.head.parameters(), 0.1),
        ]


def test_manual_optimization_with_two_optimizers(url: str) -> None:
    plain, module, by_gradient = Rivals(), Rivals(), Rivals()
    fit(plain)
    server = add_server(url)
    made = fit(module, everything(url))
    assert len(rounds(made)) == 3 and made.global_step == 27
    require_close(flat(module), flat(plain))
    require_close(server.parameters(), flat(plain))

    sgd = add_server(f"{url}-gradient", merge=ServerOptimizer(lambda p: torch.optim.SGD(p, lr=0.1)))
    fit(by_gradient, everything(f"{url}-gradient", quantity="gradient"))
    require_close(sgd.parameters(), flat(plain))


class Still(Tiny):
    """Takes steps that change nothing."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_no_training_no_update_whatever_the_precision(url: str, precision: Any) -> None:
    """Rounding the downloaded parameters to the module's precision is no change of theirs."""
    initial = np.random.default_rng(0).standard_normal(34).astype(np.float32)
    server = add_server(url, initial=initial)
    made = fit(Still(), everything(url), precision=precision)
    assert [report.uploaded_fraction for report in rounds(made)] == [0.0] * 3
    np.testing.assert_array_equal(server.parameters(), initial)


def test_divergence_is_reported_and_not_shared(url: str) -> None:
    server = add_server(url, protocol=RoundRobin())
    module = Tiny(lr=1e30)
    with pytest.raises(NonFiniteUpdateError, match="local training diverged"):
        fit(module, everything(url))
    assert np.isfinite(server.parameters()).all()
    assert not server.status().members[0].present


def test_joining_with_another_module_is_refused_before_training(url: str) -> None:
    fit(Tiny(), everything(url))
    module = Normed()
    before = flat(module)
    with pytest.raises(FingerprintMismatchError, match=r"'norm\.weight' \[5\] exists only here"):
        fit(module, everything(url, "ben"))
    assert torch.equal(flat(module), before)


def test_a_fraction_of_nothing_is_refused_before_training(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"fraction=0\.01 of 34 shared parameters selects none"):
        fit(Tiny(), DSSGDStrategy(url, "anna", selection=LargestValues(0.01)))


def test_evaluating_joins_nothing(url: str) -> None:
    server = add_server(url)
    made = trainer(everything(url))
    made.validate(Tiny(), loader(), verbose=False)
    assert server.status().members == ()


def test_finding_a_learning_rate_shares_nothing_and_leaves_no_trace(url: str, tmp_path: Path) -> None:
    server, module, expected = add_server(url), Tiny(), Tiny()
    made = trainer(everything(url), default_root_dir=tmp_path)
    Tuner(made).lr_find(module, loader(), num_training=8, update_attr=False)
    assert server.status().uploads == 0
    made.fit(module, loader())
    plain = fit(expected, everything(f"{url}-plain"))
    assert made.optimizers[0].param_groups[0]["lr"] == plain.optimizers[0].param_groups[0]["lr"]
    require_close(flat(module), flat(expected))


def test_a_checkpoint_without_rounds_resumes(url: str, tmp_path: Path) -> None:
    """One of a plain Trainer: the optimizer continues, the rounds start."""
    keep = ModelCheckpoint(tmp_path, save_last=True)
    plain = fit(Tiny(), epochs=2, callbacks=[keep], enable_checkpointing=True)
    made = trainer(everything(url), epochs=2)
    made.fit_loop.max_epochs = 3
    module = Tiny()
    made.fit(module, loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert [report.round for report in rounds(made)] == [1]
    assert made.global_step == 3 * BATCHES and len(momenta(made)) == len(momenta(plain))
