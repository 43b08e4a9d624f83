"""Data sets in files: where they are found or fetched, and what each damaged one says."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from lightning_ppdl.data import MNIST, SVHN
from lightning_ppdl.data.files import PublicFile, find
from lightning_ppdl.errors import ConfigurationError

REAL_MNIST = Path(__file__).resolve().parents[3] / "shared/data/mnist"


@pytest.fixture
def real_mnist() -> Path:
    if not REAL_MNIST.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"no MNIST files in {REAL_MNIST}")
    return REAL_MNIST


# --- MNIST ---------------------------------------------------------------------------------------


def idx(array: np.ndarray[Any, Any]) -> bytes:
    lengths = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + lengths + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for prefix, n in (("train", 20), ("t10k", 5)):
        images = draw.integers(0, 256, (n, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))
    return tmp_path


def test_the_real_mnist(real_mnist: Path) -> None:
    splits = MNIST(real_mnist).load()
    assert (len(splits.train), len(splits.test)) == (60_000, 10_000)
    assert splits.input_shape == (1, 32, 32)
    assert splits.classes == 10
    assert splits.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert splits.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    pixels = splits.train.storage[:, 0, 2:30, 2:30]
    assert int(splits.train.storage.sum()) == int(pixels.sum())  # all else is the black margin
    assert int(pixels.sum()) / pixels.numel() / 255 == pytest.approx(0.1307, abs=1e-4)  # published


def test_mnist_gzipped_or_not_here_or_where_torchvision_puts_it(
    small_mnist: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("torchvision")
    (elsewhere / "MNIST/raw").mkdir(parents=True)
    for file in small_mnist.iterdir():
        content = gzip.compress(file.read_bytes())
        (elsewhere / "MNIST/raw" / f"{file.name}.gz").write_bytes(content)
    plain, zipped = MNIST(small_mnist).load(), MNIST(str(elsewhere)).load()
    for ours, theirs in ((plain.train, zipped.train), (plain.test, zipped.test)):
        assert torch.equal(ours.storage, theirs.storage)
        assert torch.equal(ours.labels, theirs.labels)


def test_mnist_margin(small_mnist: Path) -> None:
    paper, bare = MNIST(small_mnist).load(), MNIST(small_mnist, margin=0).load()
    assert (paper.input_shape, bare.input_shape) == ((1, 32, 32), (1, 28, 28))
    assert torch.equal(paper.train.storage[:, :, 2:30, 2:30], bare.train.storage)
    with pytest.raises(ConfigurationError, match=r"data\.margin=-1"):
        MNIST(small_mnist, margin=-1)


def test_mnist_scaling(small_mnist: Path) -> None:
    plain, _ = MNIST(small_mnist).load().train[0]
    normalized, _ = MNIST(small_mnist, normalize=True).load().train[0]
    assert float(plain.min()) == 0.0
    assert float(plain.max()) == 1.0
    torch.testing.assert_close(normalized, (plain - 0.1307) / 0.3081)


def shorten(content: bytes) -> bytes:
    return content[:-1]


def shorten_gzip(content: bytes) -> bytes:
    return gzip.compress(content)[:-20]


def wrong_kind(content: bytes) -> bytes:
    return idx(np.zeros(20))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, "has 15695 bytes; its header promises 15696"),
        (shorten_gzip, "not a whole gzip file"),
        (wrong_kind, "begins with 00000801, not 00000803"),
        (lambda content: b"", "begins with nothing"),
        (lambda content: content[:6], "begins with"),
        (lambda content: idx(np.zeros((20, 8, 8))), "28 x 28"),
        (lambda content: idx(np.zeros((19, 28, 28))), "20 labels"),
    ],
)
def test_damaged_mnist_files(small_mnist: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = small_mnist / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigurationError, match=message) as caught:
        MNIST(small_mnist).load()
    assert "data.root" in str(caught.value)


@pytest.mark.parametrize("source", [MNIST, SVHN])
def test_a_root_without_the_files_says_where_to_get_them(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.root=.*http"):
        source(root=str(tmp_path)).load()
    for root in ("", 3):
        with pytest.raises(ConfigurationError, match=r"data\.root"):
            source(root=root)


# --- download ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache/lightning_ppdl"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "public").mkdir()
    (tmp_path / "public/file.gz").write_bytes(b"content")
    handler = functools.partial(Quiet, directory=str(tmp_path / "public"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/"
        listening.shutdown()


def test_a_download_is_kept_in_the_cache(server: str, cache: Path, tmp_path: Path) -> None:
    file = PublicFile("file.gz", server, hashlib.md5(b"content").hexdigest())
    assert find(file, root=None) == cache / "file.gz"
    (tmp_path / "public/file.gz").unlink()
    assert find(file, root=None).read_bytes() == b"content"


def test_a_download_with_another_checksum_is_refused(server: str, cache: Path) -> None:
    file = PublicFile("file.gz", server, hashlib.md5(b"other").hexdigest())
    with pytest.raises(ConfigurationError, match=r"hash.*set data\.root"):
        find(file, root=None)
    assert not (cache / "file.gz").exists()


@pytest.mark.parametrize("source", [MNIST(), SVHN()])
def test_offline_the_remedy_is_data_root(
    source: MNIST | SVHN, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ConfigurationError, match=r"could not be downloaded.*set data\.root"):
        source.load()


# --- SVHN ----------------------------------------------------------------------------------------


@pytest.fixture
def small_svhn(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, n in (("train", 11), ("test", 4), ("extra", 6)):
        images = draw.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        labels = (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": images, "y": labels}, do_compression=True)
    return tmp_path


def test_svhn(small_svhn: Path) -> None:
    splits = SVHN(small_svhn).load()
    assert (len(splits.train), len(splits.test)) == (17, 4)
    assert len(SVHN(small_svhn, extra=False).load().train) == 11
    assert splits.train.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]  # 10 is 0
    stored = scipy.io.loadmat(small_svhn / "extra_32x32.mat")["X"]
    inputs, _ = splits.train[11]  # the first image of the extra set: (row, column, channel)
    torch.testing.assert_close(inputs, torch.from_numpy(stored[..., 0]).permute(2, 0, 1) / 255)


def test_damaged_svhn_files(small_svhn: Path) -> None:
    file = small_svhn / "test_32x32.mat"
    whole = file.read_bytes()
    for content in (whole[:1000], whole[:-100], b"", b"not a mat file" * 100):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"data\.root.*test_32x32"):
            SVHN(small_svhn).load()
    scipy.io.savemat(file, {"X": np.zeros((32, 32, 3, 2), np.uint8)})
    with pytest.raises(ConfigurationError, match="lacks"):
        SVHN(small_svhn).load()
    scipy.io.savemat(file, {"X": np.zeros((32, 32, 2), np.uint8), "y": np.ones(2)})
    with pytest.raises(ConfigurationError, match="holds uint8 images"):
        SVHN(small_svhn).load()
