"""The private collaboration on MNIST: its data, its settings, and how they follow from epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl.data import MNIST, Features, Splits
from lightning_ppdl.models import linear
from lightning_ppdl.partition import IID, held_by_nobody
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.randomness import derive_seed
from lightning_ppdl.scattering import scattering_features
from lightning_ppdl.selection import LargestValues
from lightning_ppdl.server.protocol import Synchronous
from lightning_ppdl.simulation import Simulation

PARTICIPANTS, RECORDS, DELTA = 90, 600, 1e-5
PARTITION = IID(samples=RECORDS)


@dataclass(frozen=True)
class Loaded:
    """A source that has been loaded: one computation of the features serves all runs."""

    splits: Splits

    def load(self) -> Splits:
        return self.splits


@dataclass(frozen=True)
class Settings:
    """Chosen on the images that nobody holds.

    Args:
        rounds: Private steps of each participant, one a round.
        sampling_rate: q.
        clip: C.
        rate: Learning rate over epsilon.
    """

    rounds: int = 100
    sampling_rate: float = 0.5
    clip: float = 0.03
    rate: float = 750.0


def scattered_mnist(data_root: str | None) -> Splits:
    """3,969 features for each image: takes about a minute and 1.1 GB."""
    return Features(MNIST(root=data_root, margin=0), scattering_features()).load()


def shares_and_public_rows(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The rows that participants hold, one participant after the other, and those that nobody holds."""
    numbers = labels.numpy()
    shares = PARTITION.split(numbers, PARTICIPANTS, derive_seed(seed, "partition"))
    public = held_by_nobody(shares, len(numbers))
    return torch.from_numpy(np.concatenate(shares)), torch.from_numpy(public)


def measured_on_public_images(splits: Splits, seed: int) -> Splits:
    """The same training images, and for a test set the 6,000 of them that no participant holds."""
    _, public = shares_and_public_rows(splits.train.labels, seed)
    return Splits(splits.train, splits.train.subset(public), splits.input_shape, splits.classes)


def private_job(splits: Splits, epsilon: float, seed: int, settings: Settings, **changes: Any) -> Simulation:
    """90 participants with 600 images each: ``experiment=mnist_private`` at another epsilon."""
    job: dict[str, Any] = {
        "data": Loaded(splits),
        "partition": PARTITION,
        "participants": PARTICIPANTS,
        "model": partial(linear, bias=False),
        "optimizer": partial(torch.optim.SGD, lr=settings.rate * epsilon),
        "privacy": RecordLevel(
            epsilon=epsilon, delta=DELTA, clip=settings.clip, sampling_rate=settings.sampling_rate
        ),
        "selection": LargestValues(1.0),
        "protocol": Synchronous(),
        "rounds": settings.rounds,
        "round_length": 1,
        "batch_size": round(settings.sampling_rate * RECORDS),
        "baselines": (),
        "seed": seed,
    }
    return Simulation(**{**job, **changes})
