"""What a hostile or broken client may send: each is refused by name, nothing changes, the others go on."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_harness import (
    MANIFEST,
    SIZE,
    Client,
    Target,
    encoded,
    join_request,
    seen,
    serving,
    session_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ppdl import wire
from lightning_ppdl.records import Manifest, ParameterSpec
from lightning_ppdl.rpc import messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb
from lightning_ppdl.server.protocol import RoundRobin

STREAMS = ["OfferInitial", "UploadParts"]
OF_A_SESSION = ["TakeTurn", "RenewTurn", "EndTurn", "Download", "Upload", "Leave", *STREAMS]
METHODS = ["Join", "Status", "Export", *OF_A_SESSION]


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with serving() as served:
        made = Target(served)
        yield made
        made.require_at_work()
        made.client.close()
        made.anna.leave()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_message_of_the_schema_is_refused(target: Target, method: str) -> None:
    for garbage in (b"\xff\xff\xff", b"\x0a\x05abc", b"\x00"):
        target.require_refused(method, garbage, error="MalformedUpdateError", code="INVALID_ARGUMENT")
    target.require_refused(method, error="MalformedUpdateError", code="INVALID_ARGUMENT")  # an empty stream
    if method in ("Join", "TakeTurn"):  # a name that is no UTF-8
        target.require_refused(
            method, b"\x0a\x02\xff\xfe", error="MalformedUpdateError", code="INVALID_ARGUMENT"
        )


@pytest.mark.parametrize("method", OF_A_SESSION)
def test_a_session_that_is_nobodys_is_refused(target: Target, method: str) -> None:
    for session in ("", "0" * 32, "x" * 100_000, "\N{SNOWMAN}"):
        message: Any = pb.SessionRequest(session=session)
        if method in STREAMS:
            message = pb.Part(session=session, total_bytes=4 * SIZE, data=bytes(4 * SIZE))
        target.require_refused(method, message, error="SessionEndedError", code="ABORTED")


NAMES = [
    "",
    " ",
    "x" * 256,
    "x" * 1_000_000,
    "anna\n",
    "\x1b[31mred",
    "a\0b",
    "\u202eanna",
    "\N{SNOWMAN}" * 300,
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_are_none(target: Target, name: str) -> None:
    details = target.require_refused(
        "Join", join_request(name), error="ConfigurationError", code="INVALID_ARGUMENT"
    )
    assert "participant=" in details


def manifest(*specs: tuple[str, list[int]], **fields: Any) -> pb.Manifest:
    parameters = [pb.ParameterSpec(name=name, shape=shape, dtype="float32") for name, shape in specs]
    return pb.Manifest(parameters=parameters, **{"quantity": "change", "upload_fraction": 1.0, **fields})


@pytest.mark.parametrize(
    "declared",
    [
        manifest(),
        manifest(("w", [0])),
        manifest(("w", [10**15])),
        manifest(("w", [2**64 - 1] * 64)),
        manifest(("w", [2**64 - 1] * 100_000)),
        manifest(("w", [0] * 100_000)),
        manifest(("w", [4, 3]), ("w", [8])),
        manifest(*((str(number), []) for number in range(100_000))),
        manifest(("w" * 1_000_000, [20])),
        manifest(("w", [4, 3]), ("b", [8]), quantity=""),
        manifest(("w", [4, 3]), ("b", [8]), quantity="\N{EURO SIGN}" * 300_000),
        *(manifest(("w", [4, 3]), ("b", [8]), upload_fraction=f) for f in (0.0, -1.0, math.nan, 2.0)),
        *(manifest(("w", [4, 3]), ("b", [8]), bound=b) for b in (0.0, -1.0, math.nan)),
    ],
    ids=range(18),
)
def test_manifests_that_no_module_has(target: Target, declared: pb.Manifest) -> None:
    request = pb.JoinRequest(participant="ben", manifest=declared)
    target.require_refused("Join", request, error="JoinRefusedError", code="FAILED_PRECONDITION")


def test_another_module_is_told_the_difference_in_few_words(target: Target) -> None:
    other = Manifest((ParameterSpec("\N{GRINNING FACE}" * 1000, (20,), "float32"),))
    target.require_refused(
        "Join", join_request("ben", other), error="FingerprintMismatchError", code="FAILED_PRECONDITION"
    )


# Numbers


@pytest.mark.parametrize("fraction", [0.0, -0.0, -1.0, 1.0000001, math.nan, math.inf, -math.inf, 1e308])
def test_fractions_that_are_none(target: Target, fraction: float) -> None:
    request = pb.DownloadRequest(session=target.session, fraction=fraction)
    target.require_refused("Download", request, error="ConfigurationError", code="INVALID_ARGUMENT")


@pytest.mark.parametrize("dtype", [3, 99, -1, -(2**31), 2**31 - 1])
def test_a_value_type_of_a_later_version_is_answered_in_full_precision(target: Target, dtype: int) -> None:
    request = pb.DownloadRequest(session=target.session, fraction=1.0, known_version=2**64 - 1)
    raw = request.SerializeToString() + b"\x20" + _varint(dtype)
    answer = target.client.ask("Download", raw)
    assert answer.code == "OK"
    got = wire.decode_download(pb.Part.FromString(answer.replies[0]).data, SIZE)
    np.testing.assert_array_equal(got.values, target.server.parameters())


@pytest.mark.parametrize("seconds", [-1.0, 0.0, math.nan, -math.inf, 1e-320])
def test_who_waits_for_no_time_is_answered_at_once(seconds: float) -> None:
    with serving(protocol=RoundRobin()) as served, Client(served.url) as client:
        anna, ben = served.member("anna"), served.member("ben")
        anna.take_turn(1.0)
        started = time.monotonic()
        answer = client.ask("TakeTurn", pb.TakeTurnRequest(session=session_of(ben), wait_seconds=seconds))
        assert time.monotonic() - started < 5.0
        assert pb.TakeTurnReply.FromString(answer.replies[0]) == pb.TakeTurnReply(awaited=["anna"])


# Parts


@pytest.mark.parametrize("method", STREAMS)
def test_streams_that_do_not_keep_their_word(target: Target, method: str) -> None:
    def first(**fields: Any) -> pb.Part:
        return pb.Part(session=target.session, **fields)

    most = 4 * SIZE if method == "OfferInitial" else wire.max_update_bytes(SIZE, 1.0)
    malformed = {"error": "MalformedUpdateError", "code": "INVALID_ARGUMENT"}
    limit = {"error": "LimitExceededError", "code": "RESOURCE_EXHAUSTED"}
    refuse = target.require_refused
    refuse(method, first(total_bytes=50, data=b"x" * 49), **malformed)  # ends early
    refuse(method, first(total_bytes=50, data=b"x" * 51), **limit)
    refuse(method, first(total_bytes=50, data=b"x" * 50), pb.Part(data=b"x"), **limit)
    refuse(method, first(total_bytes=most + 1), **limit)
    refuse(method, first(total_bytes=2**64 - 1), **limit)
    refuse(method, first(total_bytes=50, data=b"x" * 50), b"\xff", **malformed)
    refuse(method, first(total_bytes=50, data=b""), **malformed)  # and so on, for ever
    refuse(method, first(total_bytes=50, data=b"x"), pb.Part(data=b"x"), **malformed)
    declared = messages.manifest_message(MANIFEST)
    refuse(method, first(total_bytes=50, manifest=declared, data=b"x" * 50), **malformed)
    for extra in (pb.Part(session=target.session), pb.Part(total_bytes=50), pb.Part(manifest=declared)):
        refuse(method, first(total_bytes=50, data=b"x" * 50), extra, **malformed)


def test_initial_parameters_of_another_length(target: Target) -> None:
    for count in (0, 1, 7, 4 * SIZE - 1, 4 * SIZE - 4):
        part = pb.Part(session=target.session, total_bytes=count, data=b"x" * count)
        target.require_refused("OfferInitial", part, error="JoinRefusedError", code="FAILED_PRECONDITION")


def test_a_message_longer_than_any_is_not_taken_in(target: Target) -> None:
    before = seen(target.server)
    large = pb.UploadRequest(session=target.session, update=bytes(3 * 2**20))
    assert target.client.ask("Upload", large).code == "RESOURCE_EXHAUSTED"
    packed = target.client.channel.unary_unary(f"/{messages.SERVICE}/Upload", lambda raw: raw)
    with pytest.raises(grpc.RpcError) as raised:  # it would unpack to fifty times as much
        packed(b"\x12" + _varint(10**8) + bytes(10**8), compression=grpc.Compression.Gzip, timeout=20)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert seen(target.server) == before
    target.require_at_work()


def test_floods_of_metadata_are_refused(target: Target) -> None:
    with Client(target.served.url, metadata=[(f"k{i}", "v" * 1000) for i in range(200)]) as client:
        assert client.ask("Status", pb.StatusRequest()).code == "RESOURCE_EXHAUSTED"
    with Client(target.served.url, metadata=[("authorization", "Bearer x"), ("x-bin", b"\xff\0")]) as client:
        assert client.ask("Status", pb.StatusRequest()).code == "OK"
    target.require_at_work()


# Updates


def test_a_replayed_round_is_answered_with_its_receipt_and_no_other_round_takes_its_place(
    target: Target,
) -> None:
    target.require_at_work()
    base = target.server.version
    target.round += 1
    message = encoded(round_=target.round, base=base, indices=[1], values=[2.0])
    receipt = target.anna.upload(message)
    before = seen(target.server)
    request = pb.UploadRequest(session=target.session, update=message)
    replies = {target.client.ask("Upload", request).replies for _ in range(20)}
    part = pb.Part(session=target.session, total_bytes=len(message), data=message)
    replies.add(target.client.ask("UploadParts", part).replies)
    ((raw,),) = replies
    assert messages.receipt_record(pb.ReceiptReply.FromString(raw)) == receipt
    assert seen(target.server) == before
    other = encoded(round_=target.round, base=base, indices=[1], values=[2.5])
    target.require_refused(
        "Upload",
        pb.UploadRequest(session=target.session, update=other),
        error="RoundSeenBeforeError",
        code="ALREADY_EXISTS",
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_updates_never_change_anything(target: Target, data: st.DataObject) -> None:
    """Valid updates, bent: each is refused by name. (What is still valid has a round that was seen.)"""
    values = np.linspace(-1.0, 1.0, SIZE)
    whole = bytearray(encoded(round_=1, base=0, indices=range(SIZE), values=values))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            whole[at] = data.draw(st.integers(0, 255))
        else:
            del whole[at : at + data.draw(st.integers(1, 20))]
        whole = whole or bytearray(b"x")
    # The round is in the header, and might have become a new one.
    if len(whole) > 20 and whole[:4] == b"PPDL":
        whole[12:20] = (1).to_bytes(8, "little")
    before, counted = seen(target.server), sum(target.server.status().rejections.values())
    answer = target.client.ask("Upload", pb.UploadRequest(session=target.session, update=bytes(whole)))
    assert answer.error.endswith("Error") and answer.error != "ServerFailedError", answer
    assert seen(target.server) == before
    assert sum(target.server.status().rejections.values()) == counted + 1


def test_random_bytes_to_every_method(target: Target) -> None:
    chance = random.Random(0)
    before = seen(target.server)
    for number in range(400):
        sent = [chance.randbytes(chance.choice([0, 1, 3, 20, 300])) for _ in range(chance.randint(0, 3))]
        answer = target.client.ask(METHODS[number % len(METHODS)], *sent)
        assert answer.code in ("OK", "INVALID_ARGUMENT", "ABORTED", "FAILED_PRECONDITION"), answer
    assert seen(target.server) == before
    target.require_at_work()


def _varint(number: int) -> bytes:
    number %= 2**64
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])
