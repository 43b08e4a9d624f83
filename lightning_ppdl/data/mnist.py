"""MNIST, by default padded to 32 x 32 as in the paper's evaluation."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lightning_ppdl.data.dataset import ArrayDataset, Splits
from lightning_ppdl.data.files import PublicFile, Root, check_root, find
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.validation import require_count

_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_FOLDERS = ("", "raw", "MNIST/raw")  # the last two: where torchvision puts them
_SIDE = 28
_MEAN, _DEVIATION = 0.1307, 0.3081  # published for the training pixels in [0, 1]


@dataclass(frozen=True)
class MNIST:
    """Handwritten digits: 60,000 + 10,000 images of shape (1, 32, 32), 10 classes.

    Args:
        root: Folder with the four IDX files, gzipped or not; torchvision's ``MNIST/raw`` below it
            is found too. None downloads them into the user's cache and checks their md5.
        normalize: False gives pixels in [0, 1]; True subtracts the public mean 0.1307 and divides
            by the public standard deviation 0.3081.
        margin: Black pixels added on every side: 2 as in the paper, 0 for the images as they are.

    Raises:
        ConfigurationError: For a root that can't be one; on loading, for files missing or damaged.
    """

    root: Root = None
    normalize: bool = False
    margin: int = 2

    def __post_init__(self) -> None:
        check_root(self.root)
        if self.margin != 0:
            require_count("data.margin", self.margin)

    def load(self) -> Splits:
        """Read the four files."""
        side = _SIDE + 2 * self.margin
        train, test = self._part("train"), self._part("t10k")
        return Splits(train, test, input_shape=(1, side, side), classes=10)

    def _part(self, prefix: str) -> ArrayDataset:
        images = read_idx(self._find(f"{prefix}-images-idx3-ubyte.gz"), dimensions=3)
        labels = read_idx(self._find(f"{prefix}-labels-idx1-ubyte.gz"), dimensions=1)
        if images.shape[1:] != (_SIDE, _SIDE) or len(images) != len(labels):
            raise ConfigurationError(
                f"data.root={self.root!r}: {prefix} has images of shape {images.shape} and "
                f"{len(labels)} labels; MNIST's are 28 x 28 with one label each: "
                "keep one data set's files in a folder"
            )
        padded = np.pad(images, ((0, 0), (self.margin,) * 2, (self.margin,) * 2))
        scale, shift = 1 / 255, 0.0
        if self.normalize:
            scale, shift = scale / _DEVIATION, -_MEAN / _DEVIATION
        return ArrayDataset(
            torch.from_numpy(padded[:, np.newaxis]),
            torch.from_numpy(labels.astype(np.int64)),
            scale=scale,
            shift=shift,
        )

    def _find(self, name: str) -> Path:
        return find(PublicFile(name, _URL, _MD5[name]), self.root, _FOLDERS)


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped or not: the format of MNIST and its relatives.

    The file is a big-endian header, 0, 0, 8 (bytes), the number of axes, and each axis's length
    in 4 bytes, and then the values.

    Args:
        path: The file.
        dimensions: The number of axes it must have: 3 for images, 1 for labels.

    Returns:
        A read-only array with that many axes.

    Raises:
        ConfigurationError: If the file is of another kind, or is not as long as its header says.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(path, f"is not a whole gzip file ({error})") from error
    header_bytes = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header_bytes:
        raise _damaged(path, f"begins with {content[:4].hex() or 'nothing'}, not 000008{dimensions:02x}")
    shape = tuple(np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist())
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        raise _damaged(path, f"has {len(content)} bytes; its header promises {expected_bytes}")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _damaged(path: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"data.root: {path} {what}; replace it with the file from {_URL}, or leave data.root null"
    )
