"""Damaged and hostile messages are refused, and only so: nothing else is raised, and little is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ppdl.errors import MalformedUpdateError
from lightning_ppdl.records import Download, SparseUpdate, ValueType
from lightning_ppdl.wire import decode_download, decode_update, encode_download, encode_update, update_header
from lightning_ppdl.wire.indices import decode_indices, encode_indices

SIZE = 1000
DTYPES: list[ValueType] = ["float32", "bfloat16", "float16"]
INDEX_SETS = [
    [],
    [4],
    [0, 1, 2, 300, 999],
    list(range(0, 1000, 3)),
    list(range(1000)),
    list(range(7, 1000, 90)),
]


def update_of(indices: Any, values: Any, name: str = "anna") -> SparseUpdate:
    return SparseUpdate(name, 3, 7, np.asarray(indices, np.int64), np.asarray(values, np.float32))


def normal(count: int) -> Any:
    return np.random.default_rng(count).standard_normal(count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices", INDEX_SETS)
def test_every_truncation_is_refused(indices: list[int], dtype: ValueType) -> None:
    message = encode_update(update_of(indices, normal(len(indices))), SIZE, dtype)
    for end in range(len(message)):
        with pytest.raises(MalformedUpdateError):
            decode_update(message[:end], SIZE)
    for tail in (b"\0", message):
        with pytest.raises(MalformedUpdateError):
            decode_update(message + tail, SIZE)


def decodes(message: bytes, decode: Callable[[bytes, int], Any] = decode_update) -> bool:
    """Whether ``message`` decodes, to something well-formed; only MalformedUpdateError may deny it."""
    try:
        got = decode(message, SIZE)
    except MalformedUpdateError:
        return False
    assert got.values.dtype == np.float32 and got.values.ndim == 1 and len(got.values) <= SIZE
    if got.indices is None:
        assert len(got.values) == SIZE
        return True
    assert got.indices.dtype == np.int64 and got.indices.shape == got.values.shape
    assert (np.diff(got.indices) > 0).all() and got.indices.min(initial=0) >= 0
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices", INDEX_SETS)
def test_corruption_is_refused_or_decodes_to_something_well_formed(
    indices: list[int], dtype: ValueType
) -> None:
    values = normal(len(indices)).astype(np.float32)
    upload = encode_update(update_of(indices, values), SIZE, dtype)
    where = None if len(indices) == SIZE else np.array(indices, np.int64)
    download = encode_download(Download(5, where, values, True), dtype)
    stream = np.random.default_rng(0)
    refused = 0
    for trial in range(1200):
        message, decode = [(upload, decode_update), (download, decode_download)][trial % 2]
        damaged = bytearray(message)
        for _ in range(int(stream.integers(1, 4))):
            # Half of the damage goes into the header, where the lengths are, and just behind it.
            end = min(70, len(message)) if trial % 4 < 2 else len(message)
            damaged[int(stream.integers(end))] = int(stream.integers(256))
        if stream.random() < 0.2:
            del damaged[int(stream.integers(len(damaged))) :]
        refused += not decodes(bytes(damaged), decode)
    assert refused > 200


@given(message=st.binary(max_size=200))
def test_noise_is_refused(message: bytes) -> None:
    assert not decodes(message)
    assert not decodes(b"PPDL" + message) or message[:2] == b"\x02\x01"


@given(
    block=st.binary(max_size=60), frame=st.binary(max_size=40), low=st.integers(0, 60), high=st.integers(0, 9)
)
@settings(max_examples=300)
def test_indices_always_increase(block: bytes, frame: bytes, low: int, high: int) -> None:
    """Whatever a block holds, also where its frames are sound."""
    content = zstandard.compress(frame)
    for count in (1, 2, len(frame) // max(high, 1)):
        packed = block[: low // 8 * count + (low % 8 > 0) * (count + 1) // 2]
        for whole in (block, bytes((low, high)) + block, bytes((low, high)) + packed + content):
            try:
                indices = decode_indices(memoryview(whole), count)
            except MalformedUpdateError:
                continue
            assert len(indices) == count and (np.diff(indices) > 0).all() and indices.min(initial=0) >= 0


def test_a_message_of_the_other_kind_is_refused() -> None:
    upload = encode_update(update_of([1], [1.0]), 5)
    download = encode_download(Download(1, np.array([1]), np.ones(1, np.float32), False))
    with pytest.raises(MalformedUpdateError, match="not a download message"):
        decode_download(upload, 5)
    with pytest.raises(MalformedUpdateError, match="not an update message"):
        decode_update(download, 5)
    with pytest.raises(MalformedUpdateError, match="not an update message"):
        update_header(download)


def test_messages_of_the_first_format_are_refused_by_its_number() -> None:
    with pytest.raises(MalformedUpdateError, match="format 2"):
        decode_update(b"PPDL\x01\x01" + bytes(60), 5)


def test_more_values_than_entries_are_refused() -> None:
    for indices in ([0, 1, 2], [0, 1, 9]):
        message = encode_update(update_of(indices, [1.0, 1.0, 1.0]), 10)
        with pytest.raises(MalformedUpdateError):
            decode_update(message, 2)
    dense = encode_download(Download(1, None, np.ones(9, np.float32), True))
    for size in (8, 10):
        with pytest.raises(MalformedUpdateError, match="all of them"):
            decode_download(dense, size)


def test_a_name_that_is_not_utf8_is_refused() -> None:
    message = encode_update(update_of([1], [1.0], name="anna"), 10).replace(b"anna", b"ann\xff")
    for read in (update_header, lambda got: decode_update(got, 10)):
        with pytest.raises(MalformedUpdateError, match="UTF-8"):
            read(message)


def test_the_header_alone_may_be_read_of_a_message_that_goes_wrong_later() -> None:
    message = encode_update(update_of([1, 2], [1.0, 2.0]), 10)
    assert update_header(message[:-5]).participant == "anna"
    assert update_header(memoryview(message)).entries == 2
    for end in range(44 + len("anna")):
        with pytest.raises(MalformedUpdateError):
            update_header(message[:end])


# magic, format, kind, value type, planes, complete, dense, name bytes, round, version, values, index bytes
HEADER = struct.Struct("<4sBBBBBBHQQQQ")


def header(count: int, block: int, dense: int = 0, name: int = 0, dtype: int = 0, planes: int = 0) -> bytes:
    return HEADER.pack(b"PPDL", 2, 1, dtype, planes, 0, dense, name, 1, 0, count, block)


def frame_claiming(size: int) -> bytes:
    """A zstandard frame whose header claims ``size`` bytes of content and holds one empty block."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"


def frame_holding(content: bytes, claim: int) -> bytes:
    """A zstandard frame that unpacks to ``content``, a repeated byte, and claims ``claim`` bytes."""
    blocks = b""
    for start in range(0, len(content), 2**17):
        size = min(2**17, len(content) - start)
        last = start + size == len(content)
        blocks += struct.pack("<I", last | 1 << 1 | size << 3)[:3] + content[:1]
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", claim) + blocks


def frame_of_unknown_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


ZEROS = bytes(2**26)
COUNT = 100


def with_indices(low_bits: int, planes: int, rest: bytes, count: int = COUNT) -> bytes:
    block = bytes((low_bits, planes)) + rest
    return header(count, len(block)) + block + bytes(4 * count)


def with_values(frame: bytes) -> bytes:
    """Every entry of SIZE, the highest bytes of the values in a frame."""
    lengths = struct.pack("<4Q", SIZE, SIZE, SIZE, len(frame))
    return header(SIZE, 0, dense=1, planes=1) + lengths + bytes(3 * SIZE) + frame


BOMBS = {
    "indices beyond the message": header(2**40, 2**40),
    "more values than entries": header(2**62, 0, dense=1),
    "as many as can be announced": header(2**64 - 1, 2**64 - 1),
    "a long name": header(0, 2**63, name=65_535),
    "no indices, but a block": header(0, 4) + bytes(4),
    "indices, but no block": header(3, 0) + bytes(12),
    "both": header(SIZE, 4, dense=1) + bytes(4 + 4 * SIZE),
    "unknown value type": header(0, 0, dtype=3),
    "unknown layout": header(0, 0, planes=2),
    "a frame that claims terabytes": with_indices(0, 1, frame_claiming(2**42)),
    "a frame that claims the right size, and is empty": with_indices(0, 1, frame_claiming(COUNT)),
    "a frame of another size": with_indices(0, 1, zstandard.compress(ZEROS)),
    "a frame that holds more than it claims": with_indices(0, 1, frame_holding(ZEROS, COUNT)),
    "a frame of unknown size": with_indices(0, 1, frame_of_unknown_size(bytes(COUNT))),
    "two frames": with_indices(0, 1, 2 * zstandard.compress(bytes(COUNT))),
    "a frame that may be skipped": with_indices(0, 1, b"\x50\x2a\x4d\x18" + bytes(4)),
    "no planes": with_indices(0, 0, zstandard.compress(b"")),
    "planes beyond 63 bits": with_indices(8, 7, bytes(COUNT) + zstandard.compress(bytes(7 * COUNT))),
    "low bits beyond the block": with_indices(248, 1, zstandard.compress(bytes(COUNT))),
    "odd low bits": with_indices(2, 1, bytes(COUNT) + zstandard.compress(bytes(COUNT))),
    "values that claim terabytes": with_values(frame_claiming(2**42)),
    "values of unknown size": with_values(frame_of_unknown_size(bytes(SIZE))),
    "values that hold more than they claim": with_values(frame_holding(ZEROS, SIZE)),
    "planes beyond the message": header(SIZE, 0, dense=1, planes=1) + struct.pack("<4Q", *[2**63] * 4),
    "planes that are no frames": header(SIZE, 0, dense=1, planes=1)
    + struct.pack("<4Q", 1, 1, 0, 9)
    + b"x" * 11,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused_without_allocating(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedUpdateError):
            decode_update(bomb, SIZE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**17


def test_the_bombs_are_what_they_claim_to_be() -> None:
    assert zstandard.frame_content_size(frame_claiming(2**42)) == 2**42
    assert zstandard.decompress(frame_holding(ZEROS, len(ZEROS))) == ZEROS
    assert zstandard.frame_content_size(frame_of_unknown_size(bytes(COUNT))) == -1
    # Made in the same way, but right, they are messages.
    frame = frame_holding(bytes(COUNT), COUNT)
    assert decode_update(with_indices(0, 1, frame), SIZE).indices.tolist() == list(range(COUNT))
    assert not decode_update(with_values(frame_holding(bytes(SIZE), SIZE)), SIZE).values.any()


def test_the_most_that_a_short_message_takes_is_in_proportion_to_the_vector() -> None:
    """A message of a few hundred bytes may truly hold a whole vector, of zeros; but no more than that."""
    size = 1_000_000
    indices = np.arange(1, size, dtype=np.int64)
    message = encode_update(update_of(indices, np.zeros(len(indices))), size)
    assert len(message) < 1000
    tracemalloc.start()
    try:
        decode_update(message, size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 * size


@pytest.mark.parametrize(("low_bits", "planes"), [(0, 7), (4, 7), (48, 1), (40, 2)])
def test_gaps_that_overflow_do_not_pass_for_indices(low_bits: int, planes: int) -> None:
    count = 600
    low = b"\xff" * (low_bits // 8 * count + (low_bits % 8 > 0) * count // 2)
    frame = zstandard.compress(b"\xff" * (planes * count))
    with pytest.raises(MalformedUpdateError, match="more than 63 bits"):
        decode_indices(memoryview(bytes((low_bits, planes)) + low + frame), count)
    # The largest that is sent is none of them.
    largest = np.array([3, 2**56 - 1])
    np.testing.assert_array_equal(decode_indices(memoryview(encode_indices(largest)), 2), largest)
