"""Records to bytes and back. What this module makes is what travels, and what byte counts count.

A message is a fixed header, the participant's name, and two blocks. The first holds the indices:
the gaps between successive ones, split into byte planes (all lowest bytes, then all second ones, ...)
under zstandard, which comes within a tenth of the entropy of a random index set (a hundredth to a tenth
of a million entries). It is left out when every entry is sent. The second holds the values as
little-endian float32, as they are: the mantissas of trained weights do not compress.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
import zstandard

from lightning_ppdl.errors import MalformedUpdateError, UnsortedIndicesError
from lightning_ppdl.records import Download, Indices, SparseUpdate, Vector

FORMAT_VERSION = 1
_MAGIC = b"PPDL"
# magic, format, kind, bytes per gap, complete, name bytes, round, version, values, index bytes
_HEADER = struct.Struct("<4sBBBBHQQQQ")


class _Kind(IntEnum):
    UPDATE = 1
    DOWNLOAD = 2


def encode_update(update: SparseUpdate, size: int) -> bytes:
    """Encode an update of a vector with ``size`` entries (P)."""
    name = update.participant.encode()
    indices = None if len(update.indices) == size else update.indices
    return _encode(_Kind.UPDATE, False, name, update.round, update.base_version, indices, update.values)


def decode_update(message: bytes, size: int) -> SparseUpdate:
    """Decode what :func:`encode_update` made for the same ``size``.

    Raises:
        MalformedUpdateError: if the message is not such an update. Indices may still be out of range.
    """
    _, name, round_, version, indices, values = _decode(message, _Kind.UPDATE, size)
    if indices is None:
        indices = np.arange(size, dtype=np.int64)
    return SparseUpdate(name, round_, version, indices, values)


def encode_download(download: Download) -> bytes:
    """Encode a download; dense where ``indices`` is None."""
    return _encode(
        _Kind.DOWNLOAD,
        download.complete,
        b"",
        0,
        download.version,
        download.indices,
        download.values,
    )


def decode_download(message: bytes, size: int) -> Download:
    """Decode what :func:`encode_download` made of a vector with ``size`` entries."""
    complete, _, _, version, indices, values = _decode(message, _Kind.DOWNLOAD, size)
    return Download(version, indices, values, complete)


def encode_indices(indices: Indices) -> tuple[int, bytes]:
    """Strictly increasing int64 indices to (bytes per gap, compressed byte planes of the gaps).

    Raises:
        UnsortedIndicesError: if they do not increase; as gaps they would arrive as other indices.
    """
    gaps = np.diff(indices, prepend=-1) - 1
    if gaps.min(initial=0) < 0:
        at = int(np.argmax(gaps < 0))
        raise UnsortedIndicesError(
            f"indices must strictly increase from 0 or more, but number {at} is {indices[at]}"
            f"{f' after {indices[at - 1]}' if at else ''}; Selection.select() must sort what it returns"
        )
    largest = int(gaps.max(initial=0))
    width = max(1, (largest.bit_length() + 7) // 8)
    planes = gaps.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].T
    # Lower levels leave more than a tenth over the entropy at one entry in a hundred, higher ones at one
    # in ten, where they look for repetitions that random gaps do not have.
    return width, zstandard.ZstdCompressor(level=3).compress(np.ascontiguousarray(planes).tobytes())


def decode_indices(block: bytes, width: int, count: int) -> Indices:
    """Undo :func:`encode_indices` for ``count`` indices.

    Raises:
        MalformedUpdateError: if the block does not hold exactly that many gaps of ``width`` bytes.
    """
    try:
        # The size is checked before anything is allocated: a block may claim to hold terabytes.
        claimed = zstandard.frame_content_size(block)
        if claimed != width * count or not 1 <= width <= 7:
            raise MalformedUpdateError(
                f"indices block holds {claimed} bytes where {count} indices of {width} bytes were announced"
            )
        raw = zstandard.ZstdDecompressor().decompress(block)
    except zstandard.ZstdError as error:
        raise MalformedUpdateError(f"indices block of {len(block)} bytes is damaged: {error}") from error
    planes = np.frombuffer(raw, np.uint8).reshape(width, count)
    gaps = np.zeros((count, 8), np.uint8)
    gaps[:, :width] = planes.T
    return np.asarray(np.cumsum(gaps.reshape(-1).view("<i8") + 1) - 1, dtype=np.int64)


def _encode(
    kind: _Kind,
    complete: bool,
    name: bytes,
    round_: int,
    version: int,
    indices: Indices | None,
    values: Vector,
) -> bytes:
    width, block = (0, b"") if indices is None else encode_indices(indices)
    header = _HEADER.pack(
        _MAGIC,
        FORMAT_VERSION,
        kind,
        width,
        complete,
        len(name),
        round_,
        version,
        len(values),
        len(block),
    )
    return b"".join([header, name, block, np.ascontiguousarray(values, dtype="<f4").tobytes()])


def _decode(message: bytes, kind: _Kind, size: int) -> tuple[bool, str, int, int, Indices | None, Vector]:
    if len(message) < _HEADER.size:
        raise MalformedUpdateError(f"message of {len(message)} bytes is shorter than its header")
    magic, format_, found, width, complete, name_size, round_, version, count, block_size = (
        _HEADER.unpack_from(message)
    )
    if magic != _MAGIC or format_ != FORMAT_VERSION or found != kind:
        raise MalformedUpdateError(
            f"not a {kind.name.lower()} message of format {FORMAT_VERSION}: starts with {message[:6]!r}"
        )
    expected = _HEADER.size + name_size + block_size + 4 * count
    if count > size or len(message) != expected or (width == 0 and count != size):
        raise MalformedUpdateError(
            f"message of {len(message)} bytes announces {count} values of a vector of {size} "
            f"({expected} bytes)"
        )
    name_end = _HEADER.size + name_size
    block_end = name_end + block_size
    try:
        name = message[_HEADER.size : name_end].decode()
    except UnicodeDecodeError as error:
        raise MalformedUpdateError("the participant's name is not UTF-8") from error
    indices = decode_indices(message[name_end:block_end], width, count) if width else None
    values = np.frombuffer(message, "<f4", offset=block_end).astype(np.float32)
    return bool(complete), name, round_, version, indices, values
