"""Buffers: statistics of one's own or shared, and modules that have nothing else to share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from strategy_harness import (
    BATCHES,
    Optimized,
    add_server,
    beside_plain,
    everything,
    fit,
    flat,
    loader,
    one_thread,
    require_alike,
    trainer,
    url,
)
from torch import Tensor, nn

from lightning_ppdl import DSSGDStrategy, LargestValues
from lightning_ppdl.backends.memory import find
from lightning_ppdl.errors import ConfigurationError

__all__ = ["one_thread", "url"]


class Normed(Optimized):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))

    @property
    def statistics(self) -> list[Tensor]:
        return list(self.norm.buffers())


@pytest.mark.parametrize("buffers", [None, "*.running_*"])
def test_statistics_of_a_lone_participant_are_plain(url: str, buffers: Any) -> None:
    own = {} if buffers is None else {"share_buffers": buffers}
    _, module = beside_plain(url, Normed, own=own)
    mean, variance, batches = module.statistics
    assert int(batches) == 3 * BATCHES
    shared = [flat(module)] + ([] if buffers is None else [mean, variance])
    require_alike(torch.from_numpy(find(url).parameters()), torch.cat(shared))


def data(module: Normed, seed: int, strategy: Any = "auto") -> None:
    trainer(strategy, epochs=2).fit(module, loader(seed))


def test_statistics_are_ones_own_unless_shared(url: str) -> None:
    """With parameters that stand still, they follow from the batches that were seen."""
    local, shared = [f"{url}-{name}" for name in ("local", "shared")]
    first, second, both, third, fourth = (Normed(lr=0.0) for _ in range(5))
    data(first, 3)
    data(second, 4)
    data(both, 3)
    data(both, 4)
    data(third, 3, everything(local, "anna"))
    data(fourth, 4, everything(local, "ben"))
    require_alike(third.statistics, first.statistics)
    require_alike(fourth.statistics, second.statistics)
    for name, seed in (("anna", 3), ("ben", 4)):
        module = Normed(lr=0.0)
        data(module, seed, everything(shared, name, share_buffers="*.running_*"))
    require_alike(module.statistics[:2], both.statistics[:2])
    # A count of batches is no real number: each keeps its own.
    assert int(module.norm.num_batches_tracked) == 2 * BATCHES != int(both.norm.num_batches_tracked)  # type: ignore[arg-type]
    assert (both.statistics[0] - second.statistics[0]).abs().max() > 1e-3


class Counted(pl.LightningModule):
    """Learns nothing by gradients: it keeps running statistics, and may hold a frozen parameter."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=False)
        if frozen:
            self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.norm(batch[0])

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("initial", ["own", 0])
def test_buffers_alone_can_be_shared(url: str, frozen: bool, initial: Any) -> None:
    """Two participants' statistics continue each other's, from a public seed or from one's own."""
    server, both = add_server(url), Counted()
    for name, seed in (("anna", 3), ("ben", 4)):
        module = Counted(frozen)
        selection = LargestValues(1.0)
        strategy = DSSGDStrategy(url, name, selection, initial=initial, share_buffers="*.running_*")
        trainer(strategy, epochs=1).fit(module, loader(seed))
        trainer(epochs=1).fit(both, loader(seed))
    require_alike([module.norm.running_mean, module.norm.running_var], list(both.norm.buffers())[:2])
    assert server.status().parameters == 10 and server.version == 2
    assert np.abs(server.parameters()).max() > 0.01


@pytest.mark.parametrize("frozen", [True, False])
def test_a_module_with_nothing_to_train_is_refused_before_training(url: str, frozen: bool) -> None:
    server, module = add_server(url), Counted(frozen)
    with pytest.raises(ConfigurationError, match="none of the module's 0 trainable parameters"):
        fit(module, everything(url))
    assert server.status().members == ()
    assert module.norm.num_batches_tracked == 0
