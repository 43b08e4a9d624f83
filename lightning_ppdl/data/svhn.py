"""Street View House Numbers, cropped digits (Netzer et al., NIPS workshop 2011)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_ppdl.data.dataset import ArrayDataset, Splits
from lightning_ppdl.data.files import PublicFile, Root, check_root, find, optional
from lightning_ppdl.errors import ConfigurationError

_URL = "http://ufldl.stanford.edu/housenumbers/"
_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
}
_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class SVHN:
    """House numbers: images of shape (3, 32, 32) with values in [0, 1], 10 classes.

    The train and extra sets together, as in the paper's evaluation, are 604,388 images: 1.9 GB of
    memory, and twice that while they load. The test set has 26,032.

    Args:
        root: Folder with the ``*_32x32.mat`` files; None downloads them (1.6 GB with the extra
            set) into the user's cache and checks their md5.
        extra: Whether the extra set is part of the training set; without it, 73,257 images.

    Raises:
        ConfigurationError: For a root that can't be one; on loading, for files missing or damaged.
    """

    root: Root = None
    extra: bool = True

    def __post_init__(self) -> None:
        check_root(self.root)

    def load(self) -> Splits:
        """Read the files."""
        names = ["train_32x32.mat"] + (["extra_32x32.mat"] if self.extra else [])
        return Splits(
            train=self._part(names),
            test=self._part(["test_32x32.mat"]),
            input_shape=_SHAPE,
            classes=10,
        )

    def _part(self, names: list[str]) -> ArrayDataset:
        paths = [find(PublicFile(name, _URL, _MD5[name]), self.root) for name in names]
        files = [_read(path) for path in paths]
        images = np.empty((sum(file.labels.size for file in files), *_SHAPE), np.uint8)
        start = 0
        for file in files:
            stop = start + file.labels.size
            images[start:stop] = file.images.transpose(3, 2, 0, 1)
            start = stop
        labels = np.concatenate([file.labels for file in files])
        return ArrayDataset(torch.from_numpy(images), torch.from_numpy(labels), scale=1 / 255)


@dataclass(frozen=True)
class _File:
    """A file's content: images (32, 32, 3, n) as stored, labels (n,) in 0..9."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def _read(path: Path) -> _File:
    matlab = optional("scipy.io.matlab", "to read SVHN")
    unreadable = (OSError, ValueError, TypeError, EOFError, zlib.error, NotImplementedError)
    try:
        content: dict[str, Any] = matlab.loadmat(path, variable_names=("X", "y"))
    except (*unreadable, matlab.MatReadError) as error:
        raise _damaged(path, f"could not be read ({error})") from error
    if not {"X", "y"} <= content.keys():
        raise _damaged(path, "lacks the variables X and y")
    images, labels = content["X"], content["y"].astype(np.int64).ravel()
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, labels.size):
        raise _damaged(path, f"holds {images.dtype} images {images.shape}, {labels.size} labels")
    return _File(images, np.where(labels == 10, 0, labels))  # the files call the digit 0 "10"


def _damaged(path: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"data.root: {path} {what}; replace it with the file from {_URL}, or leave data.root null"
    )
