"""Poisson samples of records: each is drawn independently, with secret coins."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.noise import NoiseSource
from lightning_ppdl.validation import require_count, require_fraction


class PoissonBatches(Sampler[list[int]]):
    """Batches in each of which every record is with probability q, independent of all others.

    That independence is what amplification by sampling counts on: neither the size of a batch nor who
    else is in it tells of a record. Batches of a fixed size, as shuffling makes them, are not Poisson
    samples, and DP-SGD's accounting does not hold for them.

    Args:
        records: n.
        sampling_rate: q, in (0, 1].
        noise: Source of the secret coins.
        parts: Into how many batches, one after the other, each draw is dealt out: the batches that one
            optimizer step accumulates. Every drawn record goes to each with equal chance, so that a step
            that was cut short still saw a Poisson sample.

    An epoch is ``round(1 / q)`` draws.

    ================  ======================================================================
    nobody was drawn  record 0 as a placeholder, its size 0 in ``sizes``: no step may use it
    q = 1             all records, in every draw
    ================  ======================================================================
    """

    def __init__(self, records: int, sampling_rate: float, noise: NoiseSource, parts: int = 1) -> None:
        self.records = require_count("records", records)
        self.sampling_rate = require_fraction("sampling_rate", sampling_rate)
        self.parts = require_count("parts", parts)
        self.sizes: deque[int] = deque()
        """Sizes of the batches yielded and not yet asked for, oldest first. Secret, as the batches are."""
        self._noise = noise

    def __len__(self) -> int:
        return max(1, round(1 / self.sampling_rate)) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        # Batches of an epoch that was left early are never asked for.
        sizes: deque[int] = deque()
        self.sizes = sizes
        for _ in range(len(self) // self.parts):
            drawn = np.flatnonzero(self._noise.uniform(self.records) < self.sampling_rate)
            dealt = (self._noise.uniform(len(drawn)) * self.parts).astype(np.int64)
            for part in range(self.parts):
                batch = drawn[dealt == part].tolist()
                sizes.append(len(batch))
                yield batch or [0]


def poisson_loader(
    loader: object, sampling_rate: float, noise: NoiseSource, parts: int = 1
) -> DataLoader[Any]:
    """A loader like ``loader``, with :class:`PoissonBatches` in place of its sampler.

    Raises:
        ConfigurationError: for a loader whose records cannot be drawn one by one, with equal chance.
    """
    loader = require_plain_loader(loader)
    batches = PoissonBatches(len(loader.dataset), sampling_rate, noise, parts)  # type: ignore[arg-type]
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": loader.worker_init_fn,
            "timeout": loader.timeout,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **workers,
    )


def require_plain_loader(loader: object) -> DataLoader[Any]:
    """The train loader, if Poisson sampling can take the place of its sampler.

    Raises:
        ConfigurationError: if not, with the reason and the remedy.
    """
    because = "privacy of records draws each of them independently and with the same probability"
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigurationError(
            f"the train loader is a {type(loader).__name__}, and {because}; give a "
            f"torch.utils.data.DataLoader over a data set with a length"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            f"the train data set is an IterableDataset, and {because}; give a data set with __len__ and "
            f"__getitem__"
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        made = type(loader.batch_sampler).__name__ if loader.batch_size is not None else "no batch_size"
        raise ConfigurationError(
            f"the train loader has {made}, and {because}; give DataLoader(batch_size=...) without a batch "
            f"sampler of your own"
        )
    sampler: Any = loader.sampler
    uniform = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement
    )
    if not uniform or len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
        raise ConfigurationError(
            f"the train loader's sampler is a {type(sampler).__name__} of {len(sampler)} draws, and "
            f"{because}; give none (to train on some records only, wrap the data set in "
            f"torch.utils.data.Subset)"
        )
    if not getattr(loader, "in_order", True):
        raise ConfigurationError("DataLoader(in_order=False) loses which batch is which; leave it True")
    return loader
