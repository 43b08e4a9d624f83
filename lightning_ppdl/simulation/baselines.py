"""What the collaboration is compared with (the paper's baselines): everyone alone, all data pooled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_ppdl.data import ArrayDataset, Splits, loader
from lightning_ppdl.evaluation import Evaluator
from lightning_ppdl.models import Classifier
from lightning_ppdl.randomness import derive_seed, torch_generator
from lightning_ppdl.simulation.collaboration import participant_name
from lightning_ppdl.simulation.results import Curve, Progress
from lightning_ppdl.simulation.settings import Simulation


def run_standalone(
    simulation: Simulation,
    splits: Splits,
    shares: Sequence[ArrayDataset],
    evaluator: Evaluator,
    progress: Progress,
) -> Curve:
    """Each participant trains on its own share, with nobody's help."""
    curve = Curve()
    for index, share in enumerate(shares):
        name = participant_name(index)
        line = f"standalone, {index + 1} of {len(shares)}"
        rounds = _Rounds(evaluator, _steps(simulation, 1), partial(progress, 1, line))
        _fit(simulation, splits, share, name, 1, rounds, curve)
    return curve


def run_centralized(
    simulation: Simulation,
    splits: Splits,
    pooled: ArrayDataset,
    evaluator: Evaluator,
    progress: Progress,
) -> Curve:
    """One party pools all shares; its rounds have as many steps as all participants' together."""
    curve = Curve()
    scale = simulation.participants
    rounds = _Rounds(evaluator, _steps(simulation, scale), partial(progress, scale, "centralized"))
    _fit(simulation, splits, pooled, "centralized", scale, rounds, curve)
    return curve


class _Rounds(pl.Callback):
    """Measures the module wherever a round would end."""

    def __init__(self, evaluator: Evaluator, steps: int | None, done: Callable[[], None]) -> None:
        self.accuracies: list[float] = []
        self.evaluator = evaluator
        self._steps = steps
        self._done = done

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch if self._steps is None else trainer.global_step % self._steps == 0:
            assert isinstance(pl_module, Classifier)
            self.accuracies.append(self.evaluator.of_module(pl_module))
            self._done()


def _steps(simulation: Simulation, scale: int) -> int | None:
    return None if simulation.round_length == "epoch" else simulation.round_length * scale


def _fit(
    simulation: Simulation,
    splits: Splits,
    data: ArrayDataset,
    name: str,
    scale: int,
    rounds: _Rounds,
    curve: Curve,
) -> None:
    evaluating = rounds.evaluator.seconds
    started = time.perf_counter()
    batches = loader(
        data,
        simulation.batch_size,
        shuffle=True,
        generator=torch_generator(simulation.seed, name, "shuffle"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(simulation.seed, name, "baseline"))
        trainer = simulation.make_trainer(scale, callbacks=[rounds])
        trainer.fit(simulation.make_module(splits), train_dataloaders=batches)
    curve.accuracies.append(rounds.accuracies)
    curve.seconds += time.perf_counter() - started - (rounds.evaluator.seconds - evaluating)
