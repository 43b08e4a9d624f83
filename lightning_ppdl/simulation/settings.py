"""What a simulation is made of: settings, checked at construction, and what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ppdl.data import DataSource, Splits
from lightning_ppdl.errors import ConfigurationError, PPDLError
from lightning_ppdl.models import Classifier, OptimizerFactory
from lightning_ppdl.partition import Partition
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.privacy.noise import NoiseSource, SecretNoise, SeededNoise
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.randomness import derive_seed
from lightning_ppdl.records import Quantity
from lightning_ppdl.selection import LargestValues, Selection
from lightning_ppdl.server.download import DownloadCriterion, MostUpdated
from lightning_ppdl.server.merge import MergeRule
from lightning_ppdl.server.protocol import ExchangeProtocol, RoundRobin
from lightning_ppdl.trainer_arguments import trainer_argument_problem
from lightning_ppdl.validation import require_count, require_fraction, require_round_length

BASELINES = ("standalone", "centralized")

# One progress bar for the whole run: what each Trainer would show by itself is off by default.
_QUIET_TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@dataclass(frozen=True)
class Simulation:
    """N participants, each with a real Trainer and the real strategy, against the real server.

    Args:
        data: Where the examples come from.
        partition: How the training examples are dealt out.
        model: Makes the network from ``input_shape`` and ``classes``.
        optimizer: Makes each participant's optimizer.
        participants: N.
        rounds: Rounds of each participant.
        round_length: ``"epoch"``, or optimizer steps.
        batch_size: Examples in a mini-batch.
        selection, bound, privacy, quantity, download_fraction: As in
            :class:`~lightning_ppdl.DSSGDStrategy`. Noise follows from the seed, so that runs repeat, and
            results are marked as simulated; only a mechanism with ``exact=True`` draws secret noise.
        protocol, merge, criterion: As in :class:`~lightning_ppdl.ParameterServer`.
        speed_spread: In [0, 1): participants' speeds are drawn from [1 - spread, 1 + spread]; a round
            takes 1 / speed of virtual time.
        drop_probability: In [0, 1): chance that an upload is lost.
        baselines: Which of ``standalone`` and ``centralized`` to run as well.
        trainer: Further arguments of every Trainer.
        threads: torch threads on the CPU; None leaves them as they are. One is fastest for small
            networks, and several are far slower wherever other processes use the cores.
        seed: Of everything: the same seed gives identical results on the same machine.

    Raises:
        ConfigurationError: for a value that cannot work, before anything runs.
    """

    data: DataSource
    partition: Partition
    model: Callable[..., nn.Module]
    optimizer: OptimizerFactory
    participants: int = 10
    rounds: int = 10
    round_length: int | Literal["epoch"] = "epoch"
    batch_size: int = 10
    selection: Selection | None = None
    bound: float | None = None
    privacy: Mechanism | None = None
    quantity: Quantity = "change"
    download_fraction: float = 1.0
    protocol: ExchangeProtocol = field(default_factory=RoundRobin)
    merge: MergeRule | None = None
    criterion: DownloadCriterion = field(default_factory=MostUpdated)
    speed_spread: float = 0.5
    drop_probability: float = 0.0
    baselines: Sequence[str] = BASELINES
    trainer: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("participants", "rounds", "batch_size"):
            require_count(name, getattr(self, name))
        require_round_length(self.round_length)
        if self.threads is not None:
            require_count("threads", self.threads)
        for name in ("speed_spread", "drop_probability"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigurationError(f"{name}={value!r} must be in [0, 1)")
        require_fraction("download.fraction", self.download_fraction)
        if self.privacy is None:
            PlainRelease(LargestValues() if self.selection is None else self.selection, self.bound)
        elif self.privacy.selects and self.selection is not None:
            raise ConfigurationError(
                f"selection={self.selection!r} beside privacy={self.privacy.name!r}: the mechanism selects "
                f"by itself; leave out selection, and set privacy.fraction"
            )
        if self.quantity not in ("change", "gradient"):
            raise ConfigurationError(f"quantity={self.quantity!r} must be 'change' or 'gradient'")
        merge = self.merge or self.protocol.default_merge()
        if self.quantity not in merge.quantities:
            raise ConfigurationError(
                f"quantity={self.quantity!r} cannot be merged by {type(merge).__name__}; choose "
                f"merge=optimizer, a ServerOptimizer with the participants' learning rate"
            )
        if unknown := set(self.baselines) - set(BASELINES):
            raise ConfigurationError(
                f"baselines={list(self.baselines)!r}: {unknown.pop()!r} is not one of {list(BASELINES)}"
            )
        for name, value in self.trainer.items():
            if problem := trainer_argument_problem(name, value):
                raise ConfigurationError(problem)
            count = len(value) if isinstance(value, list | tuple) else value
            if name in ("devices", "num_nodes") and isinstance(count, int) and count > 1:
                raise ConfigurationError(
                    f"trainer.{name}={value!r}: simulated participants train one after the other, on one "
                    f"device each; a participant of ppdl join may have several"
                )

    @property
    def work(self) -> int:
        """Participant-rounds of the whole run, baselines included: what progress counts up to."""
        return self.participants * self.rounds * (1 + len(set(self.baselines)))

    def make_noise(self, name: str) -> NoiseSource:
        """The noise of the participant ``name``: it follows from the seed, but for exact samplers."""
        if self.privacy is not None and self.privacy.exact:
            return SecretNoise()
        return SeededNoise(self.seed, name, "noise", simulated=True)

    def make_module(self, splits: Splits) -> Classifier:
        """A classifier with the initial parameters, which follow from the public seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "initial"))
            network = self.model(input_shape=splits.input_shape, classes=splits.classes)
        module = Classifier(network, self.optimizer, splits.classes)
        try:
            module.configure_optimizers()
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"optimizer: {error}") from error
        return module

    def make_trainer(self, rounds_scale: int = 1, **decided: Any) -> pl.Trainer:
        """A Trainer for all rounds; ``rounds_scale`` multiplies the steps of rounds counted in steps."""
        length: dict[str, Any] = {"max_epochs": self.rounds}
        if self.round_length != "epoch":
            length = {"max_epochs": -1, "max_steps": self.rounds * self.round_length * rounds_scale}
        try:
            return pl.Trainer(**{**_QUIET_TRAINER, **self.trainer, **length, **decided})
        except (TypeError, ValueError, MisconfigurationException) as error:
            if isinstance(error, PPDLError):
                raise
            raise ConfigurationError(f"trainer: {error}") from error
