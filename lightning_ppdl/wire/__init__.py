"""Records to bytes and back. What this package makes is what travels, and what byte counts count.

A message is a fixed header, the participant's name, a block of indices (:mod:`.indices`; none where every
entry is sent), and a block of values (:mod:`.values`). Nothing needs torch. The same record becomes the same
bytes, in every thread, for as long as zstandard's version stays. What is decoded owns its memory, may be
written to, and does not keep the message alive.

Decoding trusts nothing: whatever is no well-formed message raises MalformedUpdateError, and the memory that
is taken on the way stays within a small multiple of what ``size`` entries need.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from lightning_ppdl.errors import ConfigurationError, MalformedUpdateError
from lightning_ppdl.records import Download, Indices, SparseUpdate, ValueType, Vector, entries
from lightning_ppdl.validation import require_fraction
from lightning_ppdl.wire.indices import decode_indices, encode_indices, gaps_between, most_index_bytes
from lightning_ppdl.wire.values import VALUE_TYPES, decode_values, encode_values

__all__ = [
    "FORMAT_VERSION",
    "Message",
    "UpdateHeader",
    "ValueType",
    "decode_download",
    "decode_update",
    "encode_download",
    "encode_update",
    "max_message_bytes",
    "max_update_bytes",
    "update_header",
]

FORMAT_VERSION = 2
Message = bytes | bytearray | memoryview
_MAGIC = b"PPDL"
_HEADER = struct.Struct("<4sBBBBBBHQQQQ")
# A name has 255 characters at most, and UTF-8 takes up to four bytes for one.
_MOST_NAME_BYTES = 4 * 255


class _Kind(IntEnum):
    UPDATE = 1
    DOWNLOAD = 2


class _Header(NamedTuple):
    """As it lies in the message; ``dtype`` counts the value types, the next three are 0 or 1."""

    magic: bytes
    format: int
    kind: int
    dtype: int
    planes: int
    complete: int
    dense: int
    name_bytes: int
    round: int
    version: int
    entries: int
    index_bytes: int


@dataclass(frozen=True)
class UpdateHeader:
    """What an update says of itself before its entries are decoded: a claim, not checked against them.

    Args:
        participant: Who uploads.
        round: The participant's round.
        base_version: The server version the round started from.
        entries: How many entries follow.
    """

    participant: str
    round: int
    base_version: int
    entries: int


def encode_update(update: SparseUpdate, size: int, dtype: ValueType = "float32") -> bytes:
    """Encode an update of a vector with ``size`` entries (P), its values as ``dtype``.

    Rounding never takes a magnitude beyond the largest of the update, so a bound stays kept.

    Raises:
        UnsortedIndicesError: if its indices do not strictly increase.
        MalformedUpdateError: if there are not as many values as indices.
        ConfigurationError: if a value does not fit ``dtype``, or the name is longer than 255 characters.
    """
    indices: Indices | None = update.indices
    if len(update.indices) != len(update.values):
        raise MalformedUpdateError(
            f"{len(update.indices)} indices and {len(update.values)} values do not pair up"
        )
    if len(update.indices) == size > 0 and update.indices[-1] == size - 1:
        # As many as there are, up to the last, and in order: nothing to send of them.
        gaps_between(update.indices)
        indices = None
    name = update.participant.encode()
    if len(name) > _MOST_NAME_BYTES:
        raise ConfigurationError(
            f"participant={update.participant!r} must be a name of 255 characters at most"
        )
    return _encode(
        _Kind.UPDATE, False, name, update.round, update.base_version, indices, update.values, dtype
    )


def decode_update(message: Message, size: int) -> SparseUpdate:
    """Decode what :func:`encode_update` made for the same ``size``; the values are float32.

    Raises:
        MalformedUpdateError: if the message is not such an update. Its indices strictly increase, but may
            still be out of range; its values may be NaN, infinite or beyond a bound.
    """
    header, name, indices, values = _decode(message, _Kind.UPDATE, size)
    if indices is None:
        indices = np.arange(size, dtype=np.int64)
    return SparseUpdate(name, header.round, header.version, indices, values)


def update_header(message: Message) -> UpdateHeader:
    """Read who sent an update, and for which round; nothing else is decoded.

    Raises:
        MalformedUpdateError: if the message does not start as an update does.
    """
    header, name, _ = _read_header(memoryview(message), _Kind.UPDATE)
    return UpdateHeader(name, header.round, header.version, header.entries)


def encode_download(download: Download, dtype: ValueType = "float32") -> bytes:
    """Encode a download, its values as ``dtype``; dense where ``indices`` is None.

    Raises:
        UnsortedIndicesError, MalformedUpdateError, ConfigurationError: as :func:`encode_update` does.
    """
    indices, values = download.indices, download.values
    if indices is not None and len(indices) != len(values):
        raise MalformedUpdateError(f"{len(indices)} indices and {len(values)} values do not pair up")
    return _encode(_Kind.DOWNLOAD, download.complete, b"", 0, download.version, indices, values, dtype)


def decode_download(message: Message, size: int) -> Download:
    """Decode what :func:`encode_download` made of a vector with ``size`` entries; the values are float32.

    Raises:
        MalformedUpdateError: if the message is not such a download. Indices may still be out of range.
    """
    header, _, indices, values = _decode(message, _Kind.DOWNLOAD, size)
    return Download(header.version, indices, values, bool(header.complete))


def max_update_bytes(size: int, fraction: float) -> int:
    """No message with an update of at most this fraction (theta_u) of ``size`` entries is longer.

    Raises:
        ConfigurationError: if ``fraction`` is not in (0, 1].
    """
    return _most_bytes(entries(require_fraction("fraction", fraction), size), size)


def max_message_bytes(size: int) -> int:
    """No message about a vector of ``size`` entries is longer."""
    return _most_bytes(size, size)


def _most_bytes(count: int, size: int) -> int:
    return _HEADER.size + _MOST_NAME_BYTES + most_index_bytes(count, size) + 4 * count


def _encode(
    kind: _Kind,
    complete: bool,
    name: bytes,
    round_: int,
    version: int,
    indices: Indices | None,
    values: Vector,
    dtype: ValueType,
) -> bytes:
    planes, value_parts = encode_values(values, dtype)
    index_block = b"" if indices is None else encode_indices(indices)
    header = _Header(
        magic=_MAGIC,
        format=FORMAT_VERSION,
        kind=kind,
        dtype=VALUE_TYPES.index(dtype),
        planes=planes,
        complete=complete,
        dense=indices is None,
        name_bytes=len(name),
        round=round_,
        version=version,
        entries=len(values),
        index_bytes=len(index_block),
    )
    return b"".join([_HEADER.pack(*header), name, index_block, *value_parts])


def _read_header(message: memoryview, kind: _Kind) -> tuple[_Header, str, int]:
    """The header, the name, and where the blocks start."""
    if len(message) < _HEADER.size:
        raise MalformedUpdateError(f"message of {len(message)} bytes is shorter than its header")
    header = _Header._make(_HEADER.unpack_from(message))
    if header[:3] != (_MAGIC, FORMAT_VERSION, kind):
        raise MalformedUpdateError(
            f"not {'an update' if kind is _Kind.UPDATE else 'a download'} message of format "
            f"{FORMAT_VERSION}: it starts with {bytes(message[:6])!r}"
        )
    if header.dtype >= len(VALUE_TYPES) or max(header.planes, header.complete, header.dense) > 1:
        raise MalformedUpdateError(f"message header holds what no format {FORMAT_VERSION} has: {header}")
    start = _HEADER.size + header.name_bytes
    if header.name_bytes > _MOST_NAME_BYTES or len(message) < start:
        raise MalformedUpdateError(
            f"message of {len(message)} bytes announces a name of {header.name_bytes} bytes"
        )
    try:
        name = bytes(message[_HEADER.size : start]).decode()
    except UnicodeDecodeError as error:
        raise MalformedUpdateError("the participant's name is not UTF-8") from error
    return header, name, start


def _decode(message: Message, kind: _Kind, size: int) -> tuple[_Header, str, Indices | None, Vector]:
    view = memoryview(message)
    header, name, start = _read_header(view, kind)
    count, end = header.entries, start + header.index_bytes
    fits = count == size and not header.index_bytes if header.dense else count <= size
    if not fits or end > len(view):
        raise MalformedUpdateError(
            f"message of {len(view)} bytes announces {count} values of a vector of {size} entries"
            f"{', all of them' if header.dense else ''}, and {header.index_bytes} bytes of indices"
        )
    indices = None if header.dense else decode_indices(view[start:end], count)
    return (
        header,
        name,
        indices,
        decode_values(view[end:], count, VALUE_TYPES[header.dtype], bool(header.planes)),
    )
