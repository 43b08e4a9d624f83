"""Values to bytes and back: float32, or rounded to two bytes; decoded they are float32 again.

A block is either the values, little-endian, one after the other, or, where that is shorter, their bytes in
planes: the length of each plane (8 bytes), then the planes, all lowest bytes first. A plane as long as there
are values is stored as it is, a shorter one is a zstandard frame.

Random mantissas do not compress, but the byte with the exponent does, from 8 bits to less than 3 for the
weights or the update of a network: a sixth of float32, a third of bfloat16. Packing and unpacking run at 1
to 2 GB/s, so it pays on every line slower than that. Repeated and zero values compress in all planes.
"""

from __future__ import annotations

import struct
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from lightning_ppdl.errors import ConfigurationError, MalformedUpdateError
from lightning_ppdl.records import ValueType, Vector
from lightning_ppdl.wire.frames import code_entropy, unpack

VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)
# Large parts are copied once, into the message.
Part = bytes | memoryview
_Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
_LARGEST_HALF = 65504.0


def encode_values(values: Vector, dtype: ValueType) -> tuple[bool, list[Part]]:
    """float32 (k,) to (whether the block is in planes, the block in parts that are yet to be joined).

    Rounding is to the nearest, ties to even. Where that would take a magnitude beyond the largest one given,
    it is towards zero: a bound on the values given also holds for the values decoded. NaN and infinities
    arrive as such. Magnitudes below 6e-8 may become zero in float16.

    Raises:
        ConfigurationError: if ``dtype`` is none of the three, or a finite value does not fit.
    """
    if dtype not in VALUE_TYPES:
        raise ConfigurationError(f"dtype={dtype!r} must be one of {', '.join(map(repr, VALUE_TYPES))}")
    values = np.ascontiguousarray(values, dtype="<f4")
    bits = _ROUND[dtype](values)
    planes = _planes(bits)
    return (False, [bits.data]) if planes is None else (True, planes)


def decode_values(block: memoryview, count: int, dtype: ValueType, in_planes: bool) -> Vector:
    """Undo :func:`encode_values` for ``count`` values: float32 (count,), the caller's own.

    Raises:
        MalformedUpdateError: if the block does not hold exactly that many.
    """
    kind = np.uint32 if dtype == "float32" else np.uint16
    width = np.dtype(kind).itemsize
    bits: _Bits
    if in_planes:
        bits = _join_planes(block, count, kind)
    elif len(block) == width * count:
        # A copy, as a view would keep the message alive, and change with it.
        bits = np.frombuffer(block, f"<u{width}").astype(kind)
    else:
        raise MalformedUpdateError(f"values block of {len(block)} bytes for {count} values of {width} bytes")
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "bfloat16":
        whole = bits.astype(np.uint32)
        whole <<= 16
        return whole.view(np.float32)
    with np.errstate(invalid="ignore"):  # raised by NaN of the signalling kind, which pass through
        return bits.view(np.float16).astype(np.float32)


def _planes(bits: _Bits) -> list[Part] | None:
    count, width = len(bits), bits.itemsize
    parts: list[Part] = []
    for place in range(width):
        plane = np.ascontiguousarray(bits.view(np.uint8)[place::width])
        frame = code_entropy(plane)
        # A frame costs time to unpack; for less than a fiftieth it is not worth that.
        parts.append(frame if len(frame) < count - count // 50 else plane.data)
    lengths = [len(part) for part in parts]
    if 8 * width + sum(lengths) >= width * count:
        return None
    return [struct.pack(f"<{width}Q", *lengths), *parts]


def _join_planes(block: memoryview, count: int, kind: type[np.uint16 | np.uint32]) -> _Bits:
    width = np.dtype(kind).itemsize
    start = 8 * width
    lengths = struct.unpack_from(f"<{width}Q", block) if len(block) >= start else ()
    if start + sum(lengths) != len(block) or not lengths or max(lengths) > count:
        raise MalformedUpdateError(
            f"values block of {len(block)} bytes announces planes of {lengths} bytes for {count} values"
        )
    planes = []
    for length in lengths:
        part = block[start : start + length]
        stored = length == count
        planes.append(np.frombuffer(part, np.uint8) if stored else unpack(part, count, "values frame"))
        start += length
    bits: npt.NDArray[Any] = planes[-1].astype(kind)
    for plane in planes[-2::-1]:
        bits <<= 8
        bits |= plane
    return bits


def _as_they_are(values: Vector) -> _Bits:
    return values.view("<u4")


def _to_bfloat16(values: Vector) -> _Bits:
    bits = values.view("<u4")
    largest, special = _largest_finite(values)
    # The upper half, plus one where the lower half is above a half, or just a half and the upper one odd.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    upper = rounded.astype("<u2")
    _towards_zero(upper, int(largest.view(np.uint32)) >> 16)
    if special is not None:
        # The lower half may hold all that makes a NaN one: its highest mantissa bit is set instead.
        upper[special] = (bits[special] >> 16) | np.where(np.isnan(values[special]), 0x40, 0).astype("<u2")
    return upper


def _to_float16(values: Vector) -> _Bits:
    largest, special = _largest_finite(values)
    if largest > _LARGEST_HALF:
        raise ConfigurationError(
            f"dtype='float16' holds magnitudes up to {_LARGEST_HALF:g}, but there is one of {largest:g}; "
            f"send dtype='bfloat16' or dtype='float32', or give a bound"
        )
    with np.errstate(all="ignore"):
        halves = values.astype("<f2")
        half = largest.astype("<f2")
    bits = halves.view("<u2")
    _towards_zero(bits, int(half.view(np.uint16)) - int(half > largest))
    if special is not None:
        bits[special] = values[special].astype("<f2").view("<u2")
    return bits


def _largest_finite(values: Vector) -> tuple[np.float32, npt.NDArray[np.bool_] | None]:
    """The largest finite magnitude (0 if there is none), and which values are not finite (None if none)."""
    magnitude = np.abs(values)
    largest = magnitude.max(initial=0)
    if np.isfinite(largest):
        return np.float32(largest), None
    special = ~np.isfinite(values)
    return np.float32(magnitude.max(initial=0, where=~special)), special


def _towards_zero(bits: npt.NDArray[np.uint16], largest: int) -> None:
    """Take back in place what rounding lifted above ``largest``; the next pattern below is one less."""
    magnitude = bits & 0x7FFF
    if magnitude.max(initial=0) > largest:
        bits -= magnitude > largest


_ROUND = {"float32": _as_they_are, "bfloat16": _to_bfloat16, "float16": _to_float16}
