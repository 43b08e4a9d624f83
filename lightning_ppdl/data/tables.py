"""The two small data sets that ship inside scikit-learn: no download, ready in a moment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lightning_ppdl.data.dataset import ArrayDataset, Splits
from lightning_ppdl.data.files import optional
from lightning_ppdl.errors import ConfigurationError


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: 1,437 + 360 images of shape (1, 8, 8) with values in [0, 1], 10 classes.

    Args:
        seed: Draws the split, in which every class keeps its share; leave it, and everybody
            measures on the same 360 images.

    Raises:
        ConfigurationError: For a seed that can't be one; on loading, without scikit-learn.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def load(self) -> Splits:
        """Read the table inside scikit-learn."""
        table = optional("sklearn.datasets", "for Digits").load_digits()
        split = _stratified_split(table.target, test_rows=360, seed=self.seed)
        images = torch.from_numpy(table.images.astype(np.uint8)[:, np.newaxis])
        digits = ArrayDataset(images, torch.from_numpy(table.target.astype(np.int64)), scale=1 / 16)
        return Splits(
            train=digits.subset(split.train),
            test=digits.subset(split.test),
            input_shape=(1, 8, 8),
            classes=10,
        )


@dataclass(frozen=True)
class BreastCancer:
    """Wisconsin breast cancer: 455 + 114 rows of 30 measurements; 0 malignant, 1 benign.

    Every measurement is standardised to mean 0 and deviation 1 over the training rows. Unlike
    the pixel range of an image, these constants are computed from the data: they say something
    about the private records, and no privacy guarantee of this package covers them.

    Args:
        seed: Draws the split, in which every class keeps its share.

    Raises:
        ConfigurationError: For a seed that can't be one; on loading, without scikit-learn.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def load(self) -> Splits:
        """Read the table inside scikit-learn."""
        table = optional("sklearn.datasets", "for BreastCancer").load_breast_cancer()
        split = _stratified_split(table.target, test_rows=114, seed=self.seed)
        training = table.data[split.train]
        rows = ((table.data - training.mean(axis=0)) / training.std(axis=0)).astype(np.float32)
        records = ArrayDataset(torch.from_numpy(rows), torch.from_numpy(table.target.astype(np.int64)))
        return Splits(
            train=records.subset(split.train),
            test=records.subset(split.test),
            input_shape=(30,),
            classes=2,
        )


@dataclass(frozen=True)
class _Split:
    """Row numbers, disjoint, ascending, together all rows."""

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def _stratified_split(labels: npt.NDArray[np.int64], test_rows: int, seed: int) -> _Split:
    selection = optional("sklearn.model_selection", "to split a table")
    train, test = selection.train_test_split(
        np.arange(len(labels)), test_size=test_rows, stratify=labels, random_state=seed
    )
    return _Split(np.sort(train), np.sort(test))


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigurationError(f"data.seed={seed!r} must be a whole number in [0, 2**32)")
