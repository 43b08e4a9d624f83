"""What travels, how many bytes it takes, and how long it takes to pack: random index sets, normal values.

The naive form is an int64 index and a float32 value, 12 bytes an entry. Indices are also packed as the byte
planes of their gaps (zstandard, level 3: the first format of the wire) and as a bitmap under zstandard,
the ways taking turns. Medians; MB/s count the bytes of the naive form, and ms per MB those of the message.
The relative error is the worst of magnitudes above 1e-4: in bfloat16 that of the largest value, which may
only be rounded towards zero.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import zstandard
from support import print_table

from lightning_ppdl.records import Download, Indices, SparseUpdate, ValueType, Vector
from lightning_ppdl.wire import decode_download, decode_update, encode_download, encode_update
from lightning_ppdl.wire.indices import decode_indices, encode_indices
from lightning_ppdl.wire.values import VALUE_TYPES

Packing = tuple[Callable[[Indices], bytes], Callable[[bytes, int], Any]]


def entropy_bits(size: int, count: int) -> float:
    """log2 of the number of ways to choose ``count`` of ``size`` entries."""
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def pack_planes(indices: Indices) -> bytes:
    gaps = np.diff(indices, prepend=-1) - 1
    width = max(1, (int(gaps.max()).bit_length() + 7) // 8)
    planes = gaps.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].T
    return zstandard.ZstdCompressor(level=3).compress(planes.tobytes())


def unpack_planes(block: bytes, count: int) -> Indices:
    planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(block), np.uint8).reshape(-1, count)
    gaps = np.zeros((count, 8), np.uint8)
    gaps[:, : len(planes)] = planes.T
    return np.asarray(np.cumsum(gaps.reshape(-1).view("<i8") + 1) - 1, dtype=np.int64)


def pack_bitmap(indices: Indices) -> bytes:
    chosen = np.zeros(int(indices[-1]) + 1, np.uint8)
    chosen[indices] = 1
    return zstandard.ZstdCompressor(level=1).compress(np.packbits(chosen).tobytes())


def unpack_bitmap(block: bytes, count: int) -> Indices:
    bits = np.frombuffer(zstandard.ZstdDecompressor().decompress(block), np.uint8)
    return np.flatnonzero(np.unpackbits(bits))[:count]


PACKINGS: dict[str, Packing] = {
    "the wire's": (encode_indices, lambda block, count: decode_indices(memoryview(block), count)),
    "byte planes": (pack_planes, unpack_planes),
    "bitmap": (pack_bitmap, unpack_bitmap),
}


def medians(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Seconds each way takes; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def rates(naive: int, message: int, encoding: float, decoding: float) -> list[str]:
    """Columns of both directions: MB/s of the naive form, microseconds, ms per MB of the message."""
    columns = []
    for seconds in (encoding, decoding):
        columns += [
            f"{naive / 1e6 / seconds:,.0f}",
            f"{1e6 * seconds:,.0f}",
            f"{1e9 * seconds / message:.1f}",
        ]
    return columns


RATES = ["encode MB/s", "us", "ms/MB", "decode MB/s", "us", "ms/MB"]


def index_rows(label: str, size: int, indices: Indices, repetitions: int) -> list[list[str]]:
    count, bound = len(indices), entropy_bits(size, len(indices))
    blocks = {name: pack(indices) for name, (pack, _) in PACKINGS.items()}
    ways: dict[str, Callable[[], object]] = {}
    for name, (pack, unpack) in PACKINGS.items():
        assert np.array_equal(unpack(blocks[name], count), indices)
        ways[f"pack {name}"] = partial(pack, indices)
        ways[f"unpack {name}"] = partial(unpack, blocks[name], count)
    taken = medians(ways, repetitions)
    return [
        [
            f"{label}, {name}",
            f"{8 * len(block) / count:.3f}",
            f"{bound / count:.3f}",
            f"{100 * (8 * len(block) / bound - 1):+.1f}%",
            *rates(8 * count, len(block), taken[f"pack {name}"], taken[f"unpack {name}"]),
        ]
        for name, block in blocks.items()
    ]


def message_rows(
    label: str,
    naive: int,
    values: Vector,
    encode: Callable[[ValueType], bytes],
    decode: Callable[[bytes], SparseUpdate | Download],
    repetitions: int,
) -> list[list[str]]:
    rows = []
    for dtype in VALUE_TYPES:
        message = encode(dtype)
        taken = medians({"encode": partial(encode, dtype), "decode": partial(decode, message)}, repetitions)
        rows.append(
            [
                f"{label}, {dtype}",
                f"{len(message):,}",
                f"{naive / len(message):,.2f} x",
                *rates(naive, len(message), taken["encode"], taken["decode"]),
                *errors(values, decode(message).values),
            ]
        )
    return rows


def update_rows(label: str, size: int, update: SparseUpdate, repetitions: int) -> list[list[str]]:
    encode, decode = partial(encode_update, update, size), partial(decode_update, size=size)
    return message_rows(label, 12 * len(update.values), update.values, encode, decode, repetitions)


def download_rows(label: str, values: Vector, repetitions: int) -> list[list[str]]:
    encode = partial(encode_download, Download(1, None, values, True))
    decode = partial(decode_download, size=len(values))
    return message_rows(label, 4 * len(values), values, encode, decode, repetitions)


def errors(sent: Vector, got: Vector) -> list[str]:
    """The largest error of a round trip, and the largest relative one."""
    error = np.abs(got - sent)
    plain = np.abs(sent) > 1e-4
    return [f"{error.max():.1e}", f"{(error[plain] / np.abs(sent[plain])).max(initial=0):.1e}"]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--size", type=int, default=10**7)
    options.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.01, 0.001])
    options.add_argument("--repetitions", type=int, default=7)
    arguments = options.parse_args()
    stream = np.random.default_rng(0)
    cases = [(140_106, 0.1), *((arguments.size, fraction) for fraction in arguments.fractions)]
    indices_table, updates_table = [], []
    for size, fraction in cases:
        label, count = f"P = {size:,}, {fraction:g}", int(fraction * size)
        # A short message is timed more often: one interruption is as long as ten of them.
        repetitions = arguments.repetitions * max(1, min(20, 10**6 // (10 * count)))
        indices = np.sort(stream.choice(size, count, replace=False)).astype(np.int64)
        values = (1e-3 * stream.standard_normal(count)).astype(np.float32)
        indices_table += index_rows(label, size, indices, repetitions)
        updates_table += update_rows(
            label, size, SparseUpdate("clinic-a", 1, 0, indices, values), repetitions
        )
    weights = (0.02 * stream.standard_normal(arguments.size)).astype(np.float32)
    downloads_table = [
        *download_rows("weights", weights, arguments.repetitions),
        *download_rows("zeros", np.zeros_like(weights), arguments.repetitions),
    ]
    print_table(["indices, fraction", "bits an index (of 64)", "entropy", "above it", *RATES], indices_table)
    sizes = ["bytes", "smaller by"]
    print_table(["updates, fraction", *sizes, *RATES, "error", "relative"], updates_table)
    print_table([f"dense, P = {arguments.size:,}", *sizes, *RATES, "error", "relative"], downloads_table)


if __name__ == "__main__":
    main()
