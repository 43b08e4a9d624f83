"""Records survive the wire; damaged and hostile messages are refused, and only so."""

from __future__ import annotations

import math
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ppdl.errors import MalformedUpdateError, UnsortedIndicesError
from lightning_ppdl.records import Download, SparseUpdate
from lightning_ppdl.wire import (
    decode_download,
    decode_indices,
    decode_update,
    encode_download,
    encode_indices,
    encode_update,
)

names = st.text(min_size=1, max_size=40).filter(str.isprintable)
counters = st.integers(0, 2**63 - 1)


@st.composite
def sparse(draw: st.DrawFn) -> tuple[int, Any, Any]:
    """(size, indices, values): any density from empty to everything, sizes up to a million."""
    size = draw(st.one_of(st.integers(1, 50), st.sampled_from([255, 256, 257, 65_537, 1_000_000])))
    count = draw(st.one_of(st.sampled_from([0, 1, size]), st.integers(0, size)))
    stream = np.random.default_rng(draw(st.integers(0, 2**32)))
    indices = np.sort(stream.choice(size, count, replace=False)).astype(np.int64)
    values = stream.standard_normal(count).astype(np.float32)
    return size, indices, values


def update_of(indices: Any, values: Any, name: str = "anna", round_: int = 3) -> SparseUpdate:
    return SparseUpdate(name, round_, 7, np.asarray(indices, np.int64), np.asarray(values, np.float32))


@given(content=sparse(), name=names, round_=counters, version=counters)
@settings(max_examples=60, deadline=None)
def test_updates_round_trip(content: tuple[int, Any, Any], name: str, round_: int, version: int) -> None:
    size, indices, values = content
    sent = SparseUpdate(name, round_, version, indices, values)
    got = decode_update(encode_update(sent, size), size)
    assert (got.participant, got.round, got.base_version) == (name, round_, version)
    assert got.indices.dtype == np.int64 and got.values.dtype == np.float32
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(got.values.view(np.uint32), values.view(np.uint32))
    assert got.digest == sent.digest


@given(content=sparse(), version=counters, complete=st.booleans())
@settings(max_examples=60, deadline=None)
def test_downloads_round_trip(content: tuple[int, Any, Any], version: int, complete: bool) -> None:
    size, indices, values = content
    got = decode_download(encode_download(Download(version, indices, values, complete)), size)
    assert got.indices is not None
    assert (got.version, got.complete) == (version, complete)
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(got.values, values)

    vector = np.arange(size, dtype=np.float32)
    dense = decode_download(encode_download(Download(version, None, vector, True)), size)
    assert dense.indices is None
    np.testing.assert_array_equal(dense.values, vector)


def test_special_values_keep_their_bits() -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    got = decode_update(encode_update(update_of([1, 2, 300, 70_000, 99_999], values), 100_000), 100_000)
    np.testing.assert_array_equal(got.values.view(np.uint32), values.view(np.uint32))


def test_decoded_arrays_may_be_written_to() -> None:
    got = decode_update(encode_update(update_of([1, 5], [1.0, 2.0]), 9), 9)
    got.values[0] = 4.0
    got.indices[0] = 0
    assert got.values.tolist() == [4.0, 2.0] and got.indices.tolist() == [0, 5]


@pytest.mark.parametrize("indices", [[], [4], [0, 1, 2, 300, 999], list(range(1000))])
def test_every_truncation_is_refused(indices: list[int]) -> None:
    message = encode_update(update_of(indices, np.ones(len(indices))), 1000)
    for end in range(len(message)):
        with pytest.raises(MalformedUpdateError):
            decode_update(message[:end], 1000)
    for tail in (b"\0", message):
        with pytest.raises(MalformedUpdateError):
            decode_update(message + tail, 1000)


def decodes(message: bytes, size: int) -> bool:
    """Whether ``message`` decodes; only MalformedUpdateError may say that it does not."""
    try:
        got = decode_update(message, size)
    except MalformedUpdateError:
        return False
    assert got.indices.dtype == np.int64 and got.indices.shape == got.values.shape
    assert len(got.values) <= size
    return True


@pytest.mark.parametrize(
    "indices", [[], [4], [0, 1, 2, 300, 999], list(range(0, 1000, 3)), list(range(1000))]
)
def test_corruption_is_refused_or_decodes_to_a_well_formed_update(indices: list[int]) -> None:
    message = encode_update(update_of(indices, np.ones(len(indices))), 1000)
    stream = np.random.default_rng(0)
    refused = 0
    for trial in range(3000):
        damaged = bytearray(message)
        for _ in range(int(stream.integers(1, 4))):
            # Half of the damage goes into the header, where the lengths are.
            end = min(40, len(message)) if trial % 2 else len(message)
            damaged[int(stream.integers(end))] = int(stream.integers(256))
        refused += not decodes(bytes(damaged), 1000)
    assert refused > 500


@given(message=st.binary(max_size=200))
def test_noise_is_refused(message: bytes) -> None:
    assert not decodes(message, 1000)
    assert not decodes(b"PPDL" + message, 1000) or message[:2] == b"\x01\x01"


def test_a_message_of_the_other_kind_is_refused() -> None:
    upload = encode_update(update_of([1], [1.0]), 5)
    download = encode_download(Download(1, np.array([1]), np.ones(1, np.float32), False))
    with pytest.raises(MalformedUpdateError, match="not a download message"):
        decode_download(upload, 5)
    with pytest.raises(MalformedUpdateError, match=r"not an? update message"):
        decode_update(download, 5)


def test_more_values_than_entries_are_refused() -> None:
    message = encode_update(update_of([0, 1, 2], [1.0, 1.0, 1.0]), 10)
    with pytest.raises(MalformedUpdateError):
        decode_update(message, 2)


# magic, format, kind, bytes per gap, complete, name bytes, round, version, values, index bytes
HEADER = struct.Struct("<4sBBBBHQQQQ")


def header(width: int, name: int, count: int, block: int) -> bytes:
    return HEADER.pack(b"PPDL", 1, 1, width, 0, name, 1, 0, count, block)


def frame_claiming(size: int) -> bytes:
    """A zstandard frame whose header claims ``size`` bytes of content and holds one empty block."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"


@pytest.mark.parametrize(
    "bomb",
    [
        header(1, 0, 2**40, 2**40),
        header(0, 0, 2**62, 0),
        header(1, 0, 2**64 - 1, 2**64 - 1),
        header(7, 65_535, 0, 2**63),
        header(1, 0, 3, 16) + frame_claiming(2**42) + b"\0" * 12,
        header(7, 0, 3, 16) + frame_claiming(21) + b"\0" * 12,
        # A small frame that unpacks to far more than it says: 64 MiB of zeros.
        header(1, 0, 3, 0)[:-8]
        + struct.pack("<Q", len(zstandard.compress(bytes(2**26))))
        + zstandard.compress(bytes(2**26))
        + b"\0" * 12,
    ],
)
def test_bombs_are_refused_without_allocating(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedUpdateError):
            decode_update(bomb, 1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_the_bombs_are_what_they_claim_to_be() -> None:
    assert len(frame_claiming(2**42)) == 16
    assert zstandard.frame_content_size(frame_claiming(2**42)) == 2**42
    assert zstandard.frame_content_size(zstandard.compress(bytes(2**26))) == 2**26


def test_gaps_that_overflow_do_not_pass_for_indices() -> None:
    """Seven-byte gaps may add up beyond 63 bits: they wrap, and are then out of range or unsorted."""
    count = 600
    planes = np.full((7, count), 255, np.uint8)
    block = zstandard.compress(planes.tobytes())
    indices = decode_indices(block, 7, count)
    assert indices.max() > 1_000_000 or indices.min() < 0


def entropy_bytes(size: int, count: int) -> float:
    log2 = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    return log2 / 8


@pytest.mark.parametrize("fraction", [0.1, 0.01])
def test_indices_travel_within_a_tenth_of_their_entropy(fraction: float) -> None:
    size = 1_000_000
    count = int(fraction * size)
    indices = np.sort(np.random.default_rng(0).choice(size, count, replace=False))
    _, block = encode_indices(indices)
    assert entropy_bytes(size, count) < len(block) < 1.1 * entropy_bytes(size, count)
    # The measured message is the indices, four bytes a value, and less than 100 bytes besides.
    message = encode_update(update_of(indices, np.ones(count)), size)
    assert 0 <= len(message) - len(block) - 4 * count < 100


@pytest.mark.parametrize("indices", [[3, 1], [2, 2], [-1, 4], [0, 5, 4, 9]])
def test_unsorted_indices_do_not_leave_as_others(indices: list[int]) -> None:
    with pytest.raises(UnsortedIndicesError, match="must strictly increase"):
        encode_update(update_of(indices, np.ones(len(indices))), 10)


def test_everything_travels_without_indices() -> None:
    message = encode_update(update_of(np.arange(1000), np.ones(1000)), 1000)
    assert len(message) < 4 * 1000 + 100
