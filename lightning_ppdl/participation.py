"""One participant of a collaboration, from its data to its trained model: what ``ppdl join`` runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_ppdl.data import ArrayDataset, DataSource, Splits, loader
from lightning_ppdl.errors import ConfigurationError, PPDLError
from lightning_ppdl.evaluation import Evaluator
from lightning_ppdl.metrics_file import MetricsFile
from lightning_ppdl.models import Classifier, OptimizerFactory
from lightning_ppdl.partition import Partition
from lightning_ppdl.pytorch_lightning import DSSGDDDPStrategy, DSSGDStrategy
from lightning_ppdl.randomness import derive_seed, torch_generator
from lightning_ppdl.validation import require_count

CHECKPOINT = "last.ckpt"
MODEL = "model.safetensors"
METRICS = "metrics.csv"


@dataclass(frozen=True)
class ParticipationResults:
    """What came of it.

    Args:
        rounds: Rounds that this run shared; fewer than planned if it went on from a checkpoint.
        merged: How many of them are known to be merged.
        accuracy: Of the participant's model on the test data, in [0, 1].
        model: Its parameters and buffers, a safetensors file.
    """

    rounds: int
    merged: int
    accuracy: float
    model: Path


@dataclass(frozen=True)
class Participation:
    """A participant with a real Trainer, a server elsewhere, and data of its own.

    Args:
        strategy: Its part in the collaboration.
        data: Where the examples come from.
        partition: How the training examples are dealt out, where a demo data set stands for several
            participants' data.
        model: Makes the network from ``input_shape`` and ``classes``.
        optimizer: Makes the optimizer.
        participants, share: The training examples are dealt out to so many, and this one, counted from 1, has
            that share. All give the same seed.
        rounds: How many it takes part in.
        batch_size: Examples in a mini-batch.
        directory: For the checkpoint after each round, from which a further run goes on, the model and the
            metrics.
        trainer: Further arguments of the Trainer.
        threads: torch threads on the CPU; None leaves them as they are.
        seed: Of the shares, and with the participant's name of its mini-batches.

    Raises:
        ConfigurationError: for a value that cannot work, before anything runs.
    """

    strategy: DSSGDStrategy | DSSGDDDPStrategy
    data: DataSource
    partition: Partition
    model: Callable[..., nn.Module]
    optimizer: OptimizerFactory
    participants: int = 1
    share: int = 1
    rounds: int = 10
    batch_size: int = 10
    directory: Path = Path()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("participants", "share", "rounds", "batch_size"):
            require_count(name, getattr(self, name))
        if self.share > self.participants:
            raise ConfigurationError(
                f"share={self.share} must be one of participants={self.participants} shares, counted from 1; "
                f"raise participants"
            )
        if self.threads is not None:
            require_count("threads", self.threads)

    def run(self) -> ParticipationResults | None:
        """Train until all rounds are done.

        Returns:
            What came of it; None in the processes of a participant's further devices.

        Raises:
            ConfigurationError: for what only shows with the data at hand, before training starts.
            PPDLError: what the strategy and its server say.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        _quieten()
        splits = self.data.load()
        module = self._make_module(splits)
        trainer = self._make_trainer()
        checkpoint = self.directory / CHECKPOINT
        kept = str(checkpoint) if checkpoint.is_file() else None
        try:
            trainer.fit(module, train_dataloaders=self._batches(splits), ckpt_path=kept)
        except (MisconfigurationException, RuntimeError) as error:
            # What Lightning and torch say of a checkpoint that does not fit names things nobody wrote here.
            unfit = isinstance(error, MisconfigurationException) or "state_dict" in str(error)
            if kept is None or not unfit:
                raise
            raise ConfigurationError(
                f"directory={str(self.directory)!r} holds the checkpoint of a run with another model, or "
                f"with more than rounds={self.rounds}; go on with its settings, or give another directory"
            ) from error
        if not trainer.is_global_zero:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, self.directory / MODEL)
        reports = self.strategy.reports
        return ParticipationResults(
            rounds=len(reports),
            merged=sum(report.merged for report in reports),
            accuracy=Evaluator(module, splits.test, splits.classes).of_module(module),
            model=self.directory / MODEL,
        )

    def _make_module(self, splits: Splits) -> Classifier:
        # The values do not matter, since the server's take their place; but runs should repeat.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "initial"))
            network = self.model(input_shape=splits.input_shape, classes=splits.classes)
        return Classifier(network, self.optimizer, splits.classes)

    def _batches(self, splits: Splits) -> Any:
        labels = splits.train.labels.numpy()
        dealt = self.partition.split(labels, self.participants, derive_seed(self.seed, "partition"))
        mine: ArrayDataset = splits.train.subset(dealt[self.share - 1])
        generator = torch_generator(self.seed, self.strategy.participant, "shuffle")
        return loader(mine, self.batch_size, shuffle=True, generator=generator)

    def _make_trainer(self) -> pl.Trainer:
        length = self.strategy.settings.round_length
        lasts: dict[str, Any] = {"max_epochs": self.rounds}
        every: dict[str, Any] = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
        if length != "epoch":
            lasts = {"max_epochs": -1, "max_steps": self.rounds * length}
            every = {"every_n_train_steps": length}
        checkpoint = ModelCheckpoint(
            self.directory, filename="last", enable_version_counter=False, save_weights_only=False, **every
        )
        logger = MetricsFile(self.directory / METRICS)
        decided = {"strategy": self.strategy, "callbacks": [checkpoint], "logger": logger}
        quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
        return _trainer(**{**quiet, **self.trainer, **lasts, **decided})


def device_count(trainer: Mapping[str, Any]) -> int:
    """How many devices ``Trainer(**trainer)`` would train on, on all its machines.

    Raises:
        ConfigurationError: if Lightning does not know, or does not have them.
    """
    _quieten()
    named = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes") if name in trainer}
    made = _trainer(**named, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return made.num_devices * made.num_nodes


def _trainer(**arguments: Any) -> pl.Trainer:
    try:
        return pl.Trainer(**arguments)
    except (TypeError, ValueError, MisconfigurationException) as error:
        if isinstance(error, PPDLError):
            raise
        raise ConfigurationError(f"trainer: {error}") from error


def _quieten() -> None:
    # Advice on how to use Lightning is for whoever writes the Trainer, and nobody did.
    for talkative in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=talkative)
