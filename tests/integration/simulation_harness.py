"""Small simulations for the tests, and what they compare them with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_ppdl.data import Digits
from lightning_ppdl.models import mlp
from lightning_ppdl.partition import IID
from lightning_ppdl.selection import LargestValues
from lightning_ppdl.simulation import RoundRow, Simulation, SimulationResults, simulate

PARTICIPANTS, ROUNDS, SAMPLES, BATCH = 4, 3, 30, 10


def make(**changes: Any) -> Simulation:
    """Four participants with 30 digits each, three rounds of three steps, a small MLP, no baselines."""
    settings: dict[str, Any] = {
        "data": Digits(),
        "partition": IID(SAMPLES),
        "model": partial(mlp, hidden=[16]),
        "optimizer": partial(torch.optim.SGD, lr=0.2),
        "selection": LargestValues(0.2),
        "participants": PARTICIPANTS,
        "rounds": ROUNDS,
        "batch_size": BATCH,
        "baselines": (),
    }
    return Simulation(**{**settings, **changes})


def run(**changes: Any) -> SimulationResults:
    return simulate(make(**changes))


def timeless(results: SimulationResults) -> list[RoundRow]:
    """The rows without the one field that differs from run to run."""
    return [replace(row, seconds=0.0) for row in results.rows]


def accuracies(results: SimulationResults) -> list[float]:
    return [row.accuracy for row in results.rows]


class Fit:
    """One call of ``Trainer.fit()``."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, batches: Any) -> None:
        self.trainer = trainer
        self.module = module
        self.batches = batches
        self.ended = False


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fit]:
    """Every ``fit()`` that was entered, in order."""
    entered: list[Fit] = []
    original = pl.Trainer.fit

    def recorded(trainer: pl.Trainer, module: pl.LightningModule, train_dataloaders: Any) -> None:
        fit = Fit(trainer, module, train_dataloaders)
        entered.append(fit)
        try:
            original(trainer, module, train_dataloaders)
        finally:
            fit.ended = True

    monkeypatch.setattr(pl.Trainer, "fit", recorded)
    return entered
