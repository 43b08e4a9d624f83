"""Partitions: whatever the arguments, the right number of rows each, and no row twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.partition import IID, Dirichlet, Partition, Shards

IntArray = npt.NDArray[np.int64]
LABELS: IntArray = np.repeat(np.arange(10), 600)


@st.composite
def labels_and_shares(draw: st.DrawFn) -> tuple[IntArray, int, int]:
    """Labels, a number of participants, and a number of rows each that there are enough of."""
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=120))
    participants = draw(st.integers(1, len(labels)))
    samples = draw(st.integers(1, len(labels) // participants))
    return np.array(labels, np.int64), participants, samples


def check(partition: Partition, labels: IntArray, participants: int, each: int, seed: int) -> None:
    shares = partition.split(labels, participants, seed)
    assert [len(share) for share in shares] == [each] * participants
    rows = np.concatenate(shares)
    assert rows.dtype == np.int64
    assert rows.min() >= 0
    assert rows.max() < len(labels)
    assert len(np.unique(rows)) == len(rows)
    for share, again in zip(shares, partition.split(labels, participants, seed), strict=True):
        assert np.array_equal(share, again)
        assert np.array_equal(share, np.sort(share))


@given(labels_and_shares(), st.integers(0, 9))
def test_iid(case: tuple[IntArray, int, int], seed: int) -> None:
    labels, participants, samples = case
    check(IID(samples), labels, participants, samples, seed)
    check(IID(), labels, participants, len(labels) // participants, seed)


@given(labels_and_shares(), st.integers(0, 9), st.floats(1e-6, 1e6))
def test_dirichlet(case: tuple[IntArray, int, int], seed: int, alpha: float) -> None:
    labels, participants, samples = case
    check(Dirichlet(samples, alpha), labels, participants, samples, seed)
    check(Dirichlet(None, alpha), labels, participants, len(labels) // participants, seed)


@given(labels_and_shares(), st.integers(0, 9), st.data())
def test_shards(case: tuple[IntArray, int, int], seed: int, data: st.DataObject) -> None:
    labels, participants, samples = case
    shards = data.draw(st.sampled_from([k for k in range(1, samples + 1) if samples % k == 0]))
    check(Shards(samples, shards), labels, participants, samples, seed)
    largest = len(labels) // participants // shards * shards
    check(Shards(None, shards), labels, participants, largest, seed)


def classes_seen(partition: Partition) -> list[int]:
    return [len(np.unique(LABELS[share])) for share in partition.split(LABELS, 20, seed=0)]


def test_the_skew_is_what_was_asked_for() -> None:
    assert min(classes_seen(IID(200))) == 10
    assert min(classes_seen(Dirichlet(200, alpha=1e4))) == 10
    # Ten classes of 600 hold 20 single-class shares of 60 with much to spare.
    assert np.mean(classes_seen(Dirichlet(60, alpha=1e-3))) < 1.3
    # A shard of 100 lies within one class of 600.
    assert set(classes_seen(Shards(200, 2))) <= {1, 2}
    assert np.mean(classes_seen(Shards(200, 2))) > 1.5


def test_a_large_alpha_follows_the_shares_of_the_classes() -> None:
    labels = np.repeat(np.arange(2), (9000, 1000))
    shares = Dirichlet(1000, alpha=1e6).split(labels, 5, seed=0)
    ones = [labels[share].mean() for share in shares]
    assert np.mean(ones) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("partition", [IID(10), Dirichlet(10), Shards(10)])
def test_seeds_differ(partition: Partition) -> None:
    first, second = (np.concatenate(partition.split(LABELS, 5, seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("partition", "participants", "message"),
    [
        (IID(601), 10, r"partition\.samples=601 need 6010 training rows and there are 6000"),
        (Dirichlet(601), 10, "there are 6000"),
        (Shards(602), 10, "there are 6000"),
        (IID(), 6001, "6001 participants"),
        (Shards(shards=700), 10, r"partition\.shards=700"),
        (IID(), 0, "participants=0"),
    ],
)
def test_too_few_rows(partition: Partition, participants: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        partition.split(LABELS, participants, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IID(0), r"partition\.samples=0"),
        (lambda: IID(True), r"partition\.samples=True"),
        (lambda: Dirichlet(alpha=0.0), r"partition\.alpha=0"),
        (lambda: Dirichlet(alpha=float("inf")), r"partition\.alpha=inf"),
        (lambda: Shards(shards=0), r"partition\.shards=0"),
        (lambda: Shards(601, 2), "take 602"),
    ],
)
def test_bad_arguments_are_named_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_labels_must_be_whole_numbers() -> None:
    with pytest.raises(ConfigurationError, match="labels has dtype float64"):
        IID().split(np.zeros(5), 1, seed=0)  # type: ignore[arg-type]
