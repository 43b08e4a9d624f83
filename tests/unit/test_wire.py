"""Records survive the wire, in few bytes. What is no message is in test_wire_hostile.py."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ppdl.errors import (
    ConfigurationError,
    IndexOutOfRangeError,
    MalformedUpdateError,
    UnsortedIndicesError,
)
from lightning_ppdl.records import Download, SparseUpdate, entries
from lightning_ppdl.wire import (
    UpdateHeader,
    ValueType,
    decode_download,
    decode_update,
    encode_download,
    encode_update,
    max_message_bytes,
    max_update_bytes,
    update_header,
)
from lightning_ppdl.wire.indices import decode_indices, encode_indices

DTYPES: list[ValueType] = ["float32", "bfloat16", "float16"]
names = st.text(min_size=1, max_size=255).filter(str.isprintable)
counters = st.integers(0, 2**63 - 1)
dtypes = st.sampled_from(DTYPES)


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[int, Any]:
    """(size, indices): random, in runs, or evenly spaced; from none to all of up to a million."""
    size = draw(st.one_of(st.integers(1, 50), st.sampled_from([255, 256, 257, 65_537, 1_000_000])))
    stream = np.random.default_rng(draw(st.integers(0, 2**32)))
    pattern = draw(st.sampled_from(["random", "sparse", "runs", "even"]))
    if pattern == "random":
        count = draw(st.one_of(st.sampled_from([0, 1, size]), st.integers(0, size)))
        indices = np.sort(stream.choice(size, count, replace=False))
    elif pattern == "sparse":
        indices = np.unique(stream.integers(size, size=draw(st.integers(1, 300))))
    elif pattern == "runs":
        starts = stream.integers(size, size=draw(st.integers(1, 40)))
        indices = np.unique(starts[:, None] + np.arange(draw(st.integers(1, 2000))))
        indices = indices[indices < size]
    else:
        indices = np.arange(draw(st.integers(0, size - 1)), size, draw(st.integers(1, size)))
    return size, indices.astype(np.int64)


def values_for(indices: Any) -> Any:
    return np.random.default_rng(len(indices)).standard_normal(len(indices)).astype(np.float32)


def update_of(indices: Any, values: Any, name: str = "anna", round_: int = 3) -> SparseUpdate:
    return SparseUpdate(name, round_, 7, np.asarray(indices, np.int64), np.asarray(values, np.float32))


def through(values: Any, dtype: ValueType) -> Any:
    """Values as they arrive: sparse and dense, which has to be the same."""
    values = np.asarray(values, np.float32)
    size = 2 * len(values) + 1
    sparse = decode_update(encode_update(update_of(range(len(values)), values), size, dtype=dtype), size)
    dense = decode_download(encode_download(Download(1, None, values, True), dtype=dtype), len(values))
    np.testing.assert_array_equal(sparse.values.view(np.uint32), dense.values.view(np.uint32))
    return sparse.values


@given(content=index_sets(), name=names, round_=counters, version=counters)
@settings(max_examples=80, deadline=None)
def test_updates_round_trip(content: tuple[int, Any], name: str, round_: int, version: int) -> None:
    size, indices = content
    values = values_for(indices)
    sent = SparseUpdate(name, round_, version, indices, values)
    message = encode_update(sent, size)
    got = decode_update(message, size)
    assert (got.participant, got.round, got.base_version) == (name, round_, version)
    assert got.indices.dtype == np.int64 and got.values.dtype == np.float32
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(got.values.view(np.uint32), values.view(np.uint32))
    assert update_header(message) == UpdateHeader(name, round_, version, len(indices))


@given(content=index_sets(), version=counters, complete=st.booleans(), dtype=dtypes)
@settings(max_examples=60, deadline=None)
def test_downloads_round_trip(
    content: tuple[int, Any], version: int, complete: bool, dtype: ValueType
) -> None:
    size, indices = content
    # Eight bits of mantissa are enough for these, in each of the types.
    values = np.arange(len(indices), dtype=np.float32) % 256
    got = decode_download(encode_download(Download(version, indices, values, complete), dtype), size)
    assert got.indices is not None
    assert (got.version, got.complete) == (version, complete)
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(got.values, values)

    vector = np.arange(size, dtype=np.float32) % 256
    dense = decode_download(encode_download(Download(version, None, vector, True), dtype), size)
    assert dense.indices is None and dense.values.dtype == np.float32
    np.testing.assert_array_equal(dense.values, vector)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(values=st.lists(floats, min_size=1, max_size=300), dtype=dtypes)
@settings(max_examples=300, deadline=None)
def test_values_are_rounded_to_the_nearest_and_never_beyond_the_largest(
    values: list[float], dtype: ValueType
) -> None:
    sent = np.array(values, np.float32)
    finite = np.isfinite(sent)
    if dtype == "float16":
        sent[finite] = np.clip(sent[finite], -65504, 65504)
    largest = np.abs(sent[finite]).max(initial=0)
    got = through(sent, dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(sent))
    np.testing.assert_array_equal(got[np.isinf(sent)], sent[np.isinf(sent)])
    assert np.abs(got[finite]).max(initial=0) <= largest
    # Another implementation of rounding, and below the largest magnitude the very same.
    rounded = torch.from_numpy(sent).to(getattr(torch, dtype)).float().numpy()
    same = finite & (np.abs(rounded) <= largest)
    np.testing.assert_array_equal(got[same].view(np.uint32), rounded[same].view(np.uint32))
    assert (np.abs(got[finite & ~same]) <= np.abs(sent[finite & ~same])).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [1e-3, 0.1, 0.3, 1.0, 3.3333333, 3.4028235e38])
def test_a_bound_holds_for_what_arrives(dtype: ValueType, bound: float) -> None:
    if dtype == "float16":
        bound = min(bound, 65504)
    limit = np.float32(bound)
    got = through([limit, -limit, np.nextafter(limit, np.float32(0)), limit / 3], dtype)
    assert np.abs(got).max() <= limit
    relative = {"float32": 0, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    assert np.abs(got[0] - limit) <= relative * limit and got[1] == -got[0]


@pytest.mark.parametrize("value", [65504.004, -65505, 65519, 1e5, -3e38])
def test_what_does_not_fit_float16_is_no_infinity(value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"dtype='float16'.*65504.*bfloat16.*bound"):
        through([0.5, np.nan, value], "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stay_what_they_are(dtype: ValueType) -> None:
    # NaN of every kind: the second and third would become infinite if their lower halves were dropped.
    patterns = [0x7FC00000, 0x7F800001, 0xFF80FFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0]
    sent = np.array(patterns, np.uint32).view(np.float32)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        got = through(sent, dtype)
    assert np.isnan(got[:4]).all() and got[4:].tolist() == [math.inf, -math.inf, 0, 0]
    assert np.signbit(got).tolist() == np.signbit(sent).tolist()
    if dtype == "float32":
        np.testing.assert_array_equal(got.view(np.uint32), patterns)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("count", [2, 5, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_decoded_stands_on_its_own(kind: Any, count: int, dtype: ValueType) -> None:
    sent = update_of(range(count), np.ones(count))
    for size in (count, 2 * count):
        message = bytearray(encode_update(sent, size, dtype))
        got = decode_update(kind(message), size)
        # Nothing refers to the message any more, so that it may be overwritten, and even shrink.
        message[:] = bytes(len(message))
        message.clear()
        got.values[0] += 3
        got.indices[0] += 0
        assert got.values.tolist() == [4, *[1] * (count - 1)]
        np.testing.assert_array_equal(got.indices, sent.indices)


@given(content=index_sets(), dtype=dtypes)
@settings(max_examples=30, deadline=None)
def test_the_same_record_becomes_the_same_bytes_in_every_thread(
    content: tuple[int, Any], dtype: ValueType
) -> None:
    size, indices = content
    update = update_of(indices, values_for(indices))
    messages = [encode_update(update, size, dtype) for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        messages += threads.map(lambda _: encode_update(update, size, dtype), range(4))
        assert len(set(messages)) == 1
        decoded = threads.map(lambda message: decode_update(message, size).indices, messages)
        assert all(np.array_equal(indices, got) for got in decoded)


def entropy_bytes(size: int, count: int) -> float:
    log2 = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    return log2 / 8


@pytest.mark.parametrize("fraction", [0.1, 0.01, 0.001])
def test_random_indices_travel_within_a_twentieth_of_their_entropy(fraction: float) -> None:
    size = 1_000_000
    count = int(fraction * size)
    indices = np.sort(np.random.default_rng(0).choice(size, count, replace=False))
    block = encode_indices(indices)
    assert entropy_bytes(size, count) < len(block) < 1.05 * entropy_bytes(size, count)
    # The measured message is the indices, the values, and less than 100 bytes besides.
    values = np.random.default_rng(1).integers(2**32, size=count, dtype=np.uint32).view(np.float32)
    message = encode_update(update_of(indices, values), size)
    assert 0 <= len(message) - len(block) - 4 * count < 100


@pytest.mark.parametrize(
    ("indices", "most"),
    [
        (np.arange(0, 10**6, 1000), 50),
        (np.arange(10**5) + 500, 50),
        ((np.arange(0, 10**6, 25_000)[:, None] + np.arange(1000)).ravel(), 200),
        (np.array([7]), 20),
        (np.array([2**56 - 1]), 20),
    ],
)
def test_patterns_take_next_to_nothing(indices: Any, most: int) -> None:
    block = encode_indices(indices)
    assert len(block) < most
    np.testing.assert_array_equal(decode_indices(memoryview(block), len(indices)), indices)


@pytest.mark.parametrize("indices", [[3, 1], [2, 2], [-1, 4], [0, 5, 4, 9], [*range(8), 9, 8], [1, 0, 2]])
def test_unsorted_indices_do_not_leave_as_others(indices: list[int]) -> None:
    for size in (10, len(indices)):
        with pytest.raises(UnsortedIndicesError, match="must strictly increase"):
            encode_update(update_of(indices, np.ones(len(indices))), size)


def test_as_many_indices_as_entries_need_not_be_all() -> None:
    got = decode_update(encode_update(update_of([0, 1, 4], np.ones(3)), 3), 3)
    assert got.indices.tolist() == [0, 1, 4]


def test_what_cannot_be_sent_is_refused_by_the_sender() -> None:
    with pytest.raises(IndexOutOfRangeError, match=r"2\*\*56"):
        encode_update(update_of([2**56], [1.0]), 5)
    with pytest.raises(MalformedUpdateError, match="do not pair up"):
        encode_update(update_of([1, 2], [1.0]), 5)
    with pytest.raises(MalformedUpdateError, match="do not pair up"):
        encode_download(Download(1, np.array([1]), np.ones(2, np.float32), False))
    with pytest.raises(ConfigurationError, match="dtype='float64' must be one of 'float32'"):
        encode_update(update_of([1], [1.0]), 5, dtype="float64")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="255 characters"):
        encode_update(update_of([1], [1.0], name="\N{GRINNING FACE}" * 256), 5)


def test_everything_travels_without_indices() -> None:
    assert len(encode_update(update_of(np.arange(1000), values_for(range(1000))), 1000)) < 4 * 1000 + 100


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.87), ("bfloat16", 0.7), ("float16", 0.85)])
def test_weights_travel_in_less_than_their_types_take(dtype: ValueType, most: float) -> None:
    weights = (0.02 * np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
    width = 4 if dtype == "float32" else 2
    assert len(encode_download(Download(1, None, weights, True), dtype)) < most * width * len(weights)
    for repeated in (np.zeros(100_000), np.tile(weights[:10], 10_000), np.full(100_000, 0.1)):
        few = encode_download(Download(1, None, repeated.astype(np.float32), True), dtype)
        assert len(few) < 0.01 * width * len(weights)


@given(content=index_sets(), name=names, dtype=dtypes, seed=st.integers(0, 99), spare=st.floats(0, 0.2))
@settings(max_examples=150, deadline=None)
def test_no_message_is_longer_than_was_promised(
    content: tuple[int, Any], name: str, dtype: ValueType, seed: int, spare: float
) -> None:
    size, indices = content
    # Random bits do not compress, in either width.
    bits = np.random.default_rng(seed).integers(2**32, size=size, dtype=np.uint32)
    halves = bits.astype(np.uint16).view(np.float16)
    values = halves.astype(np.float32) if dtype == "float16" else bits.view(np.float32)
    message = encode_update(update_of(indices, values[: len(indices)], name), size, dtype)
    fraction = min(1.0, len(indices) / size + spare)
    if fraction > 0 and len(indices) <= entries(fraction, size):
        assert len(message) <= max_update_bytes(size, fraction) <= max_message_bytes(size)
    for where in (None, indices):
        some = values if where is None else values[: len(where)]
        sent = encode_download(Download(1, where, some, True), dtype)
        assert len(sent) <= max_message_bytes(size)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, math.nan])
def test_no_bound_for_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match="fraction="):
        max_update_bytes(100, fraction)
