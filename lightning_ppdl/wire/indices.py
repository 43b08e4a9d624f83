"""Strictly increasing indices to bytes and back, within a hundredth or two of the entropy of a random set.

What is coded are the gaps between successive indices, less one. Of a random set they are geometric: their
lowest bits are as good as uniform, and are stored as they are; what is left of them has few values, most of
them small, and goes under a Huffman coder (zstandard's). A block is

    low bits of a gap (L, a multiple of 4), planes above them (1 to 7)     a byte each
    all lowest bytes, then all second ones, ... then the last 4 of L bits, two gaps a byte
    a zstandard frame: the bytes above the low bits, all lowest ones first

and an empty one for no indices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_ppdl.errors import IndexOutOfRangeError, MalformedUpdateError, UnsortedIndicesError
from lightning_ppdl.records import Indices
from lightning_ppdl.wire.frames import Plane, code_entropy, code_repetitions, most_bytes, unpack

# The mean gap from which four low bits are worth taking off, and 16 times that for four more. Below it a gap
# mostly fits a byte; above it Huffman codes (11 bits at most) become too short for the rare long gaps. Either
# layout is 1 to 2.5% above the entropy where they meet.
_WIDE = 36
_MOST_BITS = 56
# Four runs of this many gaps decide between the layouts.
_SAMPLE = 2048


def encode_indices(indices: Indices) -> bytes:
    """Strictly increasing int64 (k,) of 0 or more to a block for :func:`decode_indices`.

    Raises:
        UnsortedIndicesError: if they do not increase; as gaps they would arrive as other indices.
        IndexOutOfRangeError: if one is 2**56 or more.
    """
    count = len(indices)
    if not count:
        return b""
    wide = gaps_between(indices)
    if indices[-1] >= 2**_MOST_BITS:
        raise IndexOutOfRangeError(f"index {indices[-1]} is beyond 2**{_MOST_BITS}, the most that is sent")
    bits = int(wide.max()).bit_length()
    gaps = wide.astype(_narrowest(bits))
    low_bits, mean = 0, (int(indices[-1]) + 1) / count
    while mean >= _WIDE * 2**low_bits:
        low_bits += 4
    # Where indices come in clusters, most gaps are small or recur, and their mean says little.
    code = code_entropy
    if _recur(gaps, bits, low_bits):
        low_bits, code = 0, code_repetitions
    low, planes = _split(gaps, bits, low_bits)
    return b"".join([bytes((low_bits, len(planes))), *low, code(planes)])


def decode_indices(block: memoryview, count: int) -> Indices:
    """Undo :func:`encode_indices` for ``count`` indices: int64 (count,), the caller's own.

    They strictly increase from 0 or more, whatever the block holds; how large they become is not checked.

    Raises:
        MalformedUpdateError: if the block does not hold exactly that many gaps, or they add up to more than
            63 bits.
    """
    if not count:
        if len(block):
            raise MalformedUpdateError(f"indices block of {len(block)} bytes for no indices")
        return np.empty(0, np.int64)
    low_bits, planes = (block[0], block[1]) if len(block) > 2 else (0, 0)
    bits = low_bits + 8 * planes
    start = 2 + low_bits // 8 * count + (low_bits % 8 + 3) // 4 * ((count + 1) // 2)
    if low_bits % 4 or not 1 <= planes <= 7 or bits > 63 or start >= len(block):
        raise MalformedUpdateError(
            f"indices block of {len(block)} bytes announces {count} gaps of {low_bits} bits and {planes} "
            f"bytes"
        )
    high = unpack(block[start:], planes * count, "indices frame").reshape(planes, count)
    gaps = high[-1].astype(_narrowest(bits), copy=False)
    for plane in high[-2::-1]:
        _append(gaps, 8, plane)
    if low_bits % 8:
        _append(gaps, 4, _unpack_nibbles(block[2 + low_bits // 8 * count : start], count))
    for number in reversed(range(low_bits // 8)):
        _append(gaps, 8, np.frombuffer(block, np.uint8, count, 2 + number * count))
    # Gaps that cannot reach 63 bits together need no second look; others only come from hostile messages.
    if bits + count.bit_length() > 62 and float(gaps.sum(dtype=np.float64)) + count > 2.0**62:
        raise MalformedUpdateError(f"the gaps between {count} indices add up to more than 63 bits")
    steps = gaps.astype(np.int64)
    steps += 1
    steps[0] -= 1
    return np.cumsum(steps, out=steps)


def most_index_bytes(count: int, size: int) -> int:
    """No block of ``count`` indices of a vector of ``size`` entries is longer."""
    # Low bits and whole bytes above them: a gap takes seven bits more than the longest one has, at most.
    content = (count * (size.bit_length() + 7) + 11) // 8
    return 2 + most_bytes(content)


def gaps_between(indices: Indices) -> Indices:
    """int64 (k,): by how much each index goes beyond the first possible one.

    Raises:
        UnsortedIndicesError: if the indices do not strictly increase from 0 or more.
    """
    gaps = np.empty(len(indices), np.int64)
    gaps[:1] = indices[:1]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    if gaps.min(initial=0) < 0:
        at = int(np.argmax(gaps < 0))
        raise UnsortedIndicesError(
            f"indices must strictly increase from 0 or more, but number {at} is {indices[at]}"
            f"{f' after {indices[at - 1]}' if at else ''}; Selection.select() must sort what it returns"
        )
    return gaps


def _recur(gaps: npt.NDArray[Any], bits: int, low_bits: int) -> bool:
    """Whether whole gaps with their repetitions take less than low bits and Huffman codes; from a sample."""
    if len(gaps) > 4 * _SAMPLE:
        starts = [number * (len(gaps) - _SAMPLE) // 3 for number in range(4)]
        gaps = np.concatenate([gaps[start : start + _SAMPLE] for start in starts])
    _, above = _split(gaps, bits, low_bits)
    _, whole = _split(gaps, bits, 0)
    return len(code_repetitions(whole)) < len(code_entropy(above)) + len(gaps) * low_bits // 8


def _split(gaps: npt.NDArray[Any], bits: int, low_bits: int) -> tuple[list[bytes], Plane]:
    """The low bits, packed, and the bytes above them as planes: uint8 (number of planes, k)."""
    low = []
    for _ in range(low_bits // 8):
        low.append(gaps.astype(np.uint8).tobytes())
        gaps = gaps >> 8
    if low_bits % 8:
        low.append(_pack_nibbles(gaps.astype(np.uint8)))
        gaps = gaps >> 4
    planes = np.empty((max(1, (bits - low_bits + 7) // 8), len(gaps)), np.uint8)
    for number, plane in enumerate(planes):
        # What does not fit a byte is cut off: it belongs to the planes above.
        plane[:] = gaps >> 8 * number if number else gaps
    return low, planes


def _narrowest(bits: int) -> type[np.generic]:
    """Arithmetic on narrow integers takes a fraction of the time."""
    return next(
        (kind for most, kind in ((8, np.uint8), (16, np.uint16), (32, np.uint32)) if bits <= most), np.int64
    )


def _append(gaps: npt.NDArray[Any], bits: int, part: Plane) -> None:
    gaps <<= bits
    gaps |= part


def _pack_nibbles(digits: Plane) -> bytes:
    """uint8 (k,), of which the lower four bits count, two to a byte."""
    even = np.zeros(len(digits) + len(digits) % 2, np.uint8)
    np.bitwise_and(digits, 15, out=even[: len(digits)])
    pairs = even.view("<u2")
    packed: Plane = (pairs | pairs >> 4).astype(np.uint8)
    return packed.tobytes()


def _unpack_nibbles(packed: memoryview, count: int) -> Plane:
    pairs = np.frombuffer(packed, np.uint8).astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)[:count]
