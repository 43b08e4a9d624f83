"""Poisson samples: who is drawn, how independently, and which loaders cannot be sampled so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.record.poisson import PoissonBatches, poisson_loader

RECORDS, RATE = 40, 0.2


def noise(seed: int = 0) -> SeededNoise:
    return SeededNoise(seed, simulated=True)


def poisson(epochs: int = 800, parts: int = 1) -> np.ndarray[Any, Any]:
    """Who was in each draw: bool (draws, records)."""
    sampler = PoissonBatches(RECORDS, RATE, noise(), parts)
    draws = []
    for _ in range(epochs):
        batches = [
            set(batch) if size else set() for batch, size in zip(list(sampler), sampler.sizes, strict=True)
        ]
        assert all(size == len(batch) for batch, size in zip(batches, sampler.sizes, strict=True))
        for start in range(0, len(batches), parts):
            draws.append(set().union(*batches[start : start + parts]))
    return membership(draws)


def shuffled(epochs: int = 800) -> np.ndarray[Any, Any]:
    """What most loaders do, and what DP-SGD's accounting does not hold for."""
    generator = torch.Generator().manual_seed(0)
    sampler = BatchSampler(RandomSampler(range(RECORDS), generator=generator), int(RATE * RECORDS), True)
    return membership(set(batch) for _ in range(epochs) for batch in sampler)


def membership(draws: Iterable[set[int]]) -> np.ndarray[Any, Any]:
    return np.array([[record in draw for record in range(RECORDS)] for draw in draws])


def p_values(drawn: np.ndarray[Any, Any]) -> dict[str, float]:
    """Of three tests: each record's frequency, the distribution of sizes, pairs of neighbours in a draw."""
    draws = len(drawn)
    z = (drawn.mean(0) - RATE) / np.sqrt(RATE * (1 - RATE) / draws)
    sizes = np.bincount(drawn.sum(1), minlength=RECORDS + 1)
    expected = stats.binom.pmf(np.arange(RECORDS + 1), RECORDS, RATE) * draws
    usual = expected > 10
    observed = np.append(sizes[usual], sizes[~usual].sum())
    together = int((drawn[:, 0::2] & drawn[:, 1::2]).sum())
    return {
        "frequency": float(stats.chi2.sf((z**2).sum(), RECORDS)),
        "size": float(stats.chisquare(observed, np.append(expected[usual], expected[~usual].sum())).pvalue),
        "pairs": float(stats.binomtest(together, draws * RECORDS // 2, RATE**2).pvalue),
    }


def test_every_record_is_drawn_independently_with_its_probability() -> None:
    found = p_values(poisson())
    assert all(p > 1e-3 for p in found.values()), found


def test_shuffled_batches_and_a_rate_5_percent_off_are_told_from_poisson_samples() -> None:
    assert p_values(shuffled())["size"] < 1e-9
    sampler = PoissonBatches(RECORDS, RATE * 1.05, noise())
    drawn = membership(set(batch) for _ in range(800) for batch in sampler)
    assert min(p_values(drawn).values()) < 1e-5


def test_accumulation_deals_out_one_draw() -> None:
    found = p_values(poisson(parts=3))
    assert all(p > 1e-3 for p in found.values()), found
    # One draw never holds a record twice, and each part alone is a Poisson sample of a third of the rate.
    sampler = PoissonBatches(RECORDS, RATE, noise(), parts=3)
    first = []
    for _ in range(300):
        batches = list(sampler)
        for start in range(0, len(batches), 3):
            sizes = list(sampler.sizes)[start : start + 3]
            drawn = [r for b, n in zip(batches[start : start + 3], sizes, strict=True) if n for r in b]
            assert len(set(drawn)) == len(drawn)
            first.append(sizes[0])
    expected = RATE / 3 * RECORDS
    spread = np.sqrt(RECORDS * RATE / 3 * (1 - RATE / 3) / len(first))
    assert abs(np.mean(first) - expected) < 4 * spread
    assert abs(np.var(first) / (RECORDS * RATE / 3 * (1 - RATE / 3)) - 1) < 0.15


def test_an_epoch_and_an_empty_draw() -> None:
    sampler = PoissonBatches(5, 0.05, noise(1))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 20
    empty = [batch for batch, size in zip(batches, sampler.sizes, strict=True) if size == 0]
    assert empty
    assert all(batch == [0] for batch in empty)
    assert [set(batch) for batch in PoissonBatches(3, 1.0, noise())] == [{0, 1, 2}]


def test_sizes_follow_the_epoch_that_is_under_way() -> None:
    sampler = PoissonBatches(50, 0.1, noise(2))
    left_early = iter(sampler)
    next(left_early)
    again = iter(sampler)
    batch = next(again)
    assert list(sampler.sizes) == [len(batch)]


def dataset(records: int = 30) -> TensorDataset:
    return TensorDataset(torch.arange(records))


def test_the_loader_keeps_all_but_the_sampler() -> None:
    def double(items: list[Any]) -> torch.Tensor:
        return 2 * torch.stack([item[0] for item in items])

    made = poisson_loader(
        DataLoader(dataset(), batch_size=6, shuffle=True, drop_last=True, collate_fn=double, num_workers=1),
        0.2,
        noise(),
    )
    assert (made.num_workers, made.collate_fn) == (1, double)
    seen = [batch.tolist() for batch in made]
    again = PoissonBatches(30, 0.2, noise())
    assert [[value // 2 for value in batch] for batch in seen] == list(again)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ([1, 2], "list"),
        (Own(dataset(), batch_size=2), "Own"),
        (DataLoader(Stream(), batch_size=2), "IterableDataset"),
        (DataLoader(dataset(), batch_size=None), "batch_size"),
        (DataLoader(dataset(), sampler=WeightedRandomSampler([1.0] * 30, 30)), "WeightedRandomSampler"),
        (DataLoader(dataset(), sampler=RandomSampler(range(30), replacement=True)), "RandomSampler"),
        (DataLoader(dataset(), sampler=SequentialSampler(range(10))), "of 10 draws.*Subset"),
        (
            DataLoader(dataset(), batch_sampler=PoissonBatches(30, 0.1, noise())),
            "no batch_size|PoissonBatches",
        ),
    ],
)
def test_loaders_that_cannot_be_sampled_are_refused(loader: object, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        poisson_loader(loader, 0.1, noise())


def test_a_subset_is_a_data_set() -> None:
    made = poisson_loader(DataLoader(Subset(dataset(), range(10)), batch_size=2), 0.2, noise())
    assert max(int(batch[0].max()) for batch in made) < 10
