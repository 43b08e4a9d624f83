"""The schema's messages from and to the package's own records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from google.protobuf.message import DecodeError, Message

from lightning_ppdl.errors import JoinRefusedError
from lightning_ppdl.records import (
    DownloadRequest,
    Manifest,
    Membership,
    MemberStatus,
    ParameterSpec,
    Quantity,
    Receipt,
    ServerStatus,
    ValueType,
    Vector,
)
from lightning_ppdl.rpc import parameter_server_pb2 as pb

SERVICE = "lightning_ppdl.v1.ParameterServer"

PART_BYTES = 2**20
"""Of a long message that travel together; gRPC's own limit is four times as much."""
_MOST_COUNTED = 2**62
"""Versions and rounds beyond it cannot be gone on from."""
_LEAST_PART_BYTES = 2**12
"""Of every part but the last: nobody is kept busy with a stream of nothing."""

MOST_ENTRIES = 2**40
"""Of a shared vector; a server may take fewer."""
_MOST_PARAMETERS = 50_000
_MOST_DIMENSIONS = 64
_MOST_NAME, _MOST_DTYPE = 1_000, 32

_VALUE_TYPES: tuple[ValueType, ...] = ("float32", "bfloat16", "float16")
_QUANTITIES: tuple[Quantity, ...] = ("change", "gradient")


UNREADABLE = object()
"""Stands for bytes that are no message of the schema."""


def parser(kind: type[Message]) -> Callable[[bytes], Message | object]:
    """Reads messages of ``kind``; what is none becomes :data:`UNREADABLE`, to be refused by name."""

    def parse(raw: bytes) -> Message | object:
        try:
            return kind.FromString(raw)
        except DecodeError:
            return UNREADABLE

    return parse


def manifest_message(manifest: Manifest) -> pb.Manifest:
    specs = [pb.ParameterSpec(name=s.name, shape=s.shape, dtype=s.dtype) for s in manifest.parameters]
    return pb.Manifest(
        parameters=specs,
        quantity=manifest.quantity,
        upload_fraction=manifest.upload_fraction,
        bound=manifest.bound,
    )


def manifest_record(message: pb.Manifest) -> Manifest:
    """
    Raises:
        JoinRefusedError: if what it names can be no module's parameters.
    """
    quantity = next((known for known in _QUANTITIES if known == message.quantity), None)
    if quantity is None:
        raise JoinRefusedError(f"quantity={message.quantity!r} must be one of {', '.join(_QUANTITIES)}")
    # Before anything is made of them: a request of a few bytes must not cost minutes.
    if len(message.parameters) > _MOST_PARAMETERS:
        raise JoinRefusedError(
            f"{len(message.parameters)} parameters are more than the {_MOST_PARAMETERS} that can be shared"
        )
    for position, spec in enumerate(message.parameters):
        if len(spec.shape) > _MOST_DIMENSIONS or len(spec.name) > _MOST_NAME or len(spec.dtype) > _MOST_DTYPE:
            raise JoinRefusedError(
                f"parameter {position} cannot be shared: its name has {len(spec.name)} characters "
                f"({_MOST_NAME} at most), its dtype {len(spec.dtype)} ({_MOST_DTYPE}), its shape "
                f"{len(spec.shape)} dimensions ({_MOST_DIMENSIONS})"
            )
    manifest = Manifest(
        tuple(ParameterSpec(spec.name, tuple(spec.shape), spec.dtype) for spec in message.parameters),
        quantity,
        message.upload_fraction,
        message.bound if message.HasField("bound") else None,
    )
    if len({spec.name for spec in manifest.parameters}) != len(manifest.parameters):
        raise JoinRefusedError("two parameters have the same name: name each once")
    if not 1 <= manifest.size <= MOST_ENTRIES:
        # Without the number: it may have a thousand digits.
        raise JoinRefusedError(
            f"{len(manifest.parameters)} parameters with {'no' if manifest.size < 1 else 'too many'} entries "
            f"cannot be shared: they can have 1 to 2**40 of them"
        )
    return manifest


def membership_message(membership: Membership) -> pb.JoinReply:
    return pb.JoinReply(**vars(membership))


def membership_record(message: pb.JoinReply) -> Membership:
    """
    Raises:
        ValueError: if no server can mean it.
    """
    _require_countable(version=message.version, last_round=message.last_round)
    if not message.session or not 0 < message.lease_seconds < math.inf:
        raise ValueError(
            f"a join was answered with session={message.session!r} and lease_seconds={message.lease_seconds}"
        )
    return Membership(
        message.session,
        message.study,
        message.version,
        message.last_round,
        message.needs_initial,
        message.lease_seconds,
        message.anytime,
    )


def download_message(session: str, request: DownloadRequest) -> pb.DownloadRequest:
    return pb.DownloadRequest(
        session=session,
        fraction=request.fraction,
        known_version=request.known_version,
        dtype=pb.ValueType.Value(request.dtype.upper()),
    )


def download_record(message: pb.DownloadRequest) -> DownloadRequest:
    known = message.known_version if message.HasField("known_version") else None
    # A value that a later version of the schema may add is answered in full precision.
    dtype = _VALUE_TYPES[message.dtype] if 0 <= message.dtype < len(_VALUE_TYPES) else "float32"
    return DownloadRequest(message.fraction, known, dtype)


def vector_record(raw: bytes | bytearray) -> Vector:
    """float32 (P,) from its little-endian bytes."""
    return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)


def receipt_message(receipt: Receipt) -> pb.ReceiptReply:
    return pb.ReceiptReply(round=receipt.round, version=receipt.version, staleness=receipt.staleness)


def receipt_record(message: pb.ReceiptReply) -> Receipt:
    """
    Raises:
        ValueError: if no server can mean it.
    """
    _require_countable(round=message.round, version=message.version, staleness=message.staleness)
    return Receipt(message.round, message.version, message.staleness)


def status_message(status: ServerStatus) -> pb.StatusReply:
    members = [pb.MemberStatus(**vars(member)) for member in status.members]
    return pb.StatusReply(**{**vars(status), "members": members})


def status_record(message: pb.StatusReply) -> ServerStatus:
    return ServerStatus(
        version=message.version,
        parameters=message.parameters,
        awaited=tuple(message.awaited),
        members=tuple(MemberStatus(m.name, m.present, m.rounds, m.idle_seconds) for m in message.members),
        uploads=message.uploads,
        uploaded_bytes=message.uploaded_bytes,
        downloaded_bytes=message.downloaded_bytes,
        rejections=dict(message.rejections),
    )


def parts(
    message: bytes | memoryview, session: str = "", manifest: Manifest | None = None
) -> Iterator[pb.Part]:
    """``message`` in parts, at least one; what goes with it is in the first."""
    view = memoryview(message)
    first = pb.Part(data=bytes(view[:PART_BYTES]), total_bytes=len(view), session=session)
    if manifest is not None:
        first.manifest.CopyFrom(manifest_message(manifest))
    yield first
    for start in range(PART_BYTES, len(view), PART_BYTES):
        yield pb.Part(data=bytes(view[start : start + PART_BYTES]))


def _require_countable(**numbers: int) -> None:
    for name, value in numbers.items():
        if not 0 <= value < _MOST_COUNTED:
            raise ValueError(f"{name}={value} is more than was ever counted")


class Assembly:
    """A long message that arrives in parts.

    Args:
        most_bytes: What it can be at most.

    Raises:
        OverflowError: from :meth:`add`, as soon as there is more than that, or than was announced.
        ValueError: from :meth:`add`, for what can be no part at its place.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._announced: int | None = None
        self._data = bytearray()

    def add(self, part: pb.Part) -> None:
        """Take the next part."""
        if self._announced is None:
            self._announced = part.total_bytes
        elif part.total_bytes or part.session or part.HasField("manifest"):
            raise ValueError("a part holds what belongs into the first one only")
        if self._announced > self._most_bytes or len(self._data) + len(part.data) > self._announced:
            raise OverflowError(
                f"{max(self._announced, len(self._data) + len(part.data))} bytes are more than the "
                f"{min(self._announced, self._most_bytes)} that such a message can have"
            )
        self._data += part.data
        if len(part.data) < _LEAST_PART_BYTES and len(self._data) < self._announced:
            raise ValueError(
                f"a part of {len(part.data)} bytes is not the last: such a one needs {_LEAST_PART_BYTES}"
            )

    def take(self) -> bytearray:
        """The whole message.

        Raises:
            EOFError: if it is not all there.
        """
        if self._announced is None or len(self._data) != self._announced:
            raise EOFError(f"{len(self._data)} bytes arrived of {self._announced or 0} that were announced")
        return self._data
