"""Data sets in memory: what arrives in a batch, what is shared, and what is refused."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.data import ArrayDataset, BreastCancer, Digits, Splits, loader
from lightning_ppdl.errors import ConfigurationError


def rows(n: int = 12, shape: tuple[int, ...] = (1, 4, 4)) -> ArrayDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    return ArrayDataset(inputs, torch.arange(n) % 3, scale=1 / 255, shift=-0.5)


# --- ArrayDataset --------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 11), min_size=1, max_size=20))
def test_a_batch_is_its_items_stacked(indices: list[int]) -> None:
    dataset = rows()
    inputs, labels = dataset.__getitems__(indices)
    items = [dataset[index] for index in indices]
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64
    torch.testing.assert_close(inputs, torch.stack([item[0] for item in items]), rtol=0, atol=0)
    assert labels.tolist() == [int(item[1]) for item in items]


def test_values_are_scaled_then_shifted() -> None:
    dataset = ArrayDataset(torch.tensor([[0], [255]], dtype=torch.uint8), torch.tensor([0, 1]))
    assert dataset[1][0].tolist() == [255.0]
    dataset = ArrayDataset(dataset.storage, dataset.labels, scale=2 / 255, shift=-1.0)
    assert [float(dataset[row][0]) for row in (0, 1, -1)] == pytest.approx([-1.0, 1.0, 1.0])


def test_float_storage_is_not_changed_by_reading_it() -> None:
    raw = torch.ones(3, 2)
    dataset = ArrayDataset(raw, torch.zeros(3, dtype=torch.int64), scale=3.0, shift=1.0)
    for _ in range(2):
        assert dataset[0][0].tolist() == [4.0, 4.0]
    assert raw.eq(1).all()


def test_subsets_share_one_storage_and_compose() -> None:
    whole = rows()
    part = whole.subset(np.array([3, 5, 7]))
    inner = part.subset([2, 0])
    assert {view.storage.data_ptr() for view in (part, inner)} == {whole.storage.data_ptr()}
    assert len(inner) == 2
    assert inner.labels.tolist() == whole.labels[[7, 3]].tolist()
    torch.testing.assert_close(inner[0][0], whole[7][0])
    assert len(whole.subset([])) == 0


def test_a_pickled_subset_holds_no_other_rows() -> None:
    part = rows(1000).subset([1, 4])
    content = pickle.dumps(part)
    copy = pickle.loads(content)
    assert len(content) < 4000  # a thousand rows are 16,000 bytes
    assert len(copy.storage) == 2
    assert copy.labels.tolist() == part.labels.tolist()
    torch.testing.assert_close(copy[1][0], part[1][0])
    assert len(part.storage) == 1000


@pytest.mark.parametrize("index", [12, -13])
def test_a_row_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError, match="12 rows"):
        rows()[index]


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 12], "rows 0 to 11"), ([-1], "reach from -1"), ([0.5], "float"), ([[1]], "shape")],
)
def test_a_subset_rejects_bad_indices(indices: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rows().subset(indices)


@pytest.mark.parametrize(
    ("inputs", "labels", "options", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2).long(), {}, "inputs has dtype"),
        (torch.zeros(2), torch.zeros(2).long(), {}, "inputs has dtype"),
        (torch.zeros(2, 3), torch.zeros(2), {}, "labels has dtype"),
        (torch.zeros(2, 3), torch.zeros(3).long(), {}, r"shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"scale": float("nan")}, "scale=nan"),
    ],
)
def test_an_array_dataset_rejects(
    inputs: torch.Tensor, labels: torch.Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ArrayDataset(inputs, labels, **options)


def test_splits_reject_what_contradicts_them() -> None:
    with pytest.raises(ConfigurationError, match="classes=2"):
        Splits(rows(), rows(), (1, 4, 4), 2)
    with pytest.raises(ConfigurationError, match="input_shape"):
        Splits(rows(), rows(), (16,), 3)


# --- loader --------------------------------------------------------------------------------------


def test_a_loader_visits_every_row_once_in_an_order_fixed_by_its_generator() -> None:
    dataset = ArrayDataset(torch.arange(25.0).reshape(25, 1), torch.arange(25))

    def epoch(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        batches = list(loader(dataset, 10, shuffle=True, generator=generator))
        assert [len(labels) for _, labels in batches] == [10, 10, 5]
        for inputs, labels in batches:
            assert inputs.flatten().tolist() == labels.tolist()
        return torch.cat([labels for _, labels in batches]).tolist()

    assert sorted(epoch(1)) == list(range(25))
    assert epoch(1) == epoch(1) != epoch(2)
    in_order = torch.cat([labels for _, labels in loader(dataset, 10)])
    assert in_order.tolist() == list(range(25))


def test_a_loader_rejects_an_empty_batch() -> None:
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        loader(rows(), 0)


# --- tables --------------------------------------------------------------------------------------


def test_digits() -> None:
    splits = Digits().load()
    assert (len(splits.train), len(splits.test)) == (1437, 360)
    inputs, labels = splits.train.__getitems__(range(1437))
    assert inputs.shape == (1437, 1, 8, 8)
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)
    assert splits.train.storage.data_ptr() == splits.test.storage.data_ptr()
    share = torch.bincount(labels) / 1437 - torch.bincount(splits.test.labels) / 360
    assert share.abs().max() < 0.005  # stratified
    assert torch.equal(labels, Digits().load().train.labels)
    assert not torch.equal(labels, Digits(seed=1).load().train.labels)
    with pytest.raises(ConfigurationError, match=r"data\.seed=-1"):
        Digits(seed=-1)


def test_breast_cancer() -> None:
    splits = BreastCancer().load()
    assert (len(splits.train), len(splits.test)) == (455, 114)
    inputs, _ = splits.train.__getitems__(range(455))
    assert inputs.shape == (455, 30)
    assert splits.classes == 2
    torch.testing.assert_close(inputs.mean(0), torch.zeros(30), rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(30), rtol=0, atol=1e-5)


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigurationError, match=r"pip install lightning_ppdl\[simulate\]"):
        Digits().load()
