"""Tiny modules and Trainers, so that a whole ``fit()`` takes tens of milliseconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ppdl import Add, DSSGDStrategy, LargestValues, ParameterServer, close, serve

BATCHES = 6
_numbers = itertools.count()


@pytest.fixture
def url() -> Iterator[str]:
    """An address that no other test has."""
    address = f"memory://integration-{next(_numbers)}"
    yield address
    close(address)


def loader(seed: int = 0, shuffle: bool = False, batches: int = BATCHES) -> DataLoader[Any]:
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * batches, 5, generator=stream)
    y = x[:, :2] * 0.5 + 0.1 * torch.randn(4 * batches, 2, generator=stream)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)


class Tiny(pl.LightningModule):
    """A small regression with momentum and a schedule: state that rounds must not disturb."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.backbone = nn.Linear(5, 4)
            self.head = nn.Linear(4, 2)
        self.dropout = nn.Dropout(dropout)
        self.lr, self.momentum = lr, momentum

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.backbone(x))))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, self.lr, self.momentum)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()])


def add_server(url: str, **settings: Any) -> ParameterServer:
    return serve(url, ParameterServer(merge=settings.pop("merge", Add()), **settings))


def everything(url: str, participant: str = "anna", **settings: Any) -> DSSGDStrategy:
    """A strategy that shares all, starting from the module's own values: alone, it is plain training."""
    settings.setdefault("selection", LargestValues(1.0))
    settings.setdefault("initial", "own")
    return DSSGDStrategy(url, participant, **settings)


def trainer(strategy: Any = "auto", epochs: int | None = 3, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": epochs,
    }
    return pl.Trainer(strategy=strategy, **{**quiet, **settings})


def fit(module: pl.LightningModule, strategy: Any = "auto", **settings: Any) -> pl.Trainer:
    made = trainer(strategy, **settings)
    made.fit(module, loader())
    return made


def momenta(of: pl.Trainer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in of.optimizers[0].state.values()]


def rounds(of: pl.Trainer) -> list[Any]:
    """The reports of all rounds of a participant's Trainer."""
    from lightning_ppdl import DSSGDCallback

    (callback,) = [callback for callback in of.callbacks if isinstance(callback, DSSGDCallback)]  # type: ignore[attr-defined]
    return callback.reports


def require_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-4, atol=1e-5)
