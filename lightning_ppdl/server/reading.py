"""What a client sends in one request, checked message by message as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

from lightning_ppdl.errors import LimitExceededError, MalformedUpdateError
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.transfers import Caller

#: Messages; :data:`~lightning_ppdl.rpc.messages.UNREADABLE` for what is none of the schema's.
Sent: TypeAlias = AsyncIterator[Any]


async def single_message(sent: Sent, caller: Caller) -> Any:
    """The message of a request that has one.

    Raises:
        MalformedUpdateError: if there is none, or it is none of the schema's.
    """
    request = await _next(sent, caller)
    if request is None:
        raise MalformedUpdateError("the request holds no message")
    return request


async def first_part(sent: Sent, caller: Caller) -> pb.Part:
    """The first part of a long message, which says whose it is.

    Raises:
        MalformedUpdateError: if there is none, or it cannot be one.
    """
    part: pb.Part | None = await _next(sent, caller)
    if part is None:
        raise MalformedUpdateError("the stream holds no part")
    if part.HasField("manifest"):
        raise MalformedUpdateError("the first part holds a manifest, which belongs to a join")
    return part


async def whole_message(first: pb.Part, sent: Sent, caller: Caller, most_bytes: int) -> bytearray:
    """The long message that begins with ``first``, after its other parts have come.

    Raises:
        LimitExceededError: as soon as there are more than ``most_bytes``, or than was announced.
        MalformedUpdateError: for what can be no part at its place, or if it is not all there.
    """
    try:
        assembly = messages.Assembly(most_bytes)
        assembly.add(first)
        while (part := await _next(sent, caller)) is not None:
            assembly.add(part)
        return assembly.take()
    except OverflowError as error:
        raise LimitExceededError(str(error)) from None
    except (EOFError, ValueError) as error:
        raise MalformedUpdateError(str(error)) from None


async def _next(sent: Sent, caller: Caller) -> Any:
    """The next message; None after the last."""
    received = await caller.receive(sent)
    if received is messages.UNREADABLE:
        raise MalformedUpdateError("the request is no message of this schema")
    return received
