"""The schema, its messages from and to the package's records, and errors as status codes."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_ppdl.rpc
from lightning_ppdl import errors
from lightning_ppdl.records import (
    DownloadRequest,
    Manifest,
    Membership,
    MemberStatus,
    ParameterSpec,
    Receipt,
    ServerStatus,
)
from lightning_ppdl.rpc import failures, messages
from lightning_ppdl.rpc import parameter_server_pb2 as pb

SCHEMA = Path(lightning_ppdl.rpc.__file__).with_name("parameter_server.proto")
T = TypeVar("T")

words = st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable())
counters = st.integers(0, 2**62 - 1)
seconds = st.floats(0, exclude_min=True, allow_infinity=False)
fractions = st.floats(0, 1)
specs = st.builds(ParameterSpec, words, st.lists(st.integers(1, 9), max_size=4).map(tuple), words)
manifests = st.builds(
    Manifest,
    st.lists(specs, min_size=1, max_size=5, unique_by=lambda spec: spec.name).map(tuple),
    st.sampled_from(["change", "gradient"]),
    fractions,
    st.none() | st.floats(allow_nan=False),
)
memberships = st.builds(Membership, words, words, counters, counters, st.booleans(), seconds)
members = st.builds(MemberStatus, words, st.booleans(), counters, st.floats(allow_nan=False))
statuses = st.builds(
    ServerStatus,
    counters,
    counters,
    st.lists(words, max_size=3).map(tuple),
    st.lists(members, max_size=3).map(tuple),
    counters,
    counters,
    counters,
    st.dictionaries(words, counters, max_size=3),
)
requests = st.builds(
    DownloadRequest,
    fractions,
    st.none() | counters,
    st.sampled_from(["float32", "bfloat16", "float16"]),
)


# The schema


def test_the_generated_module_is_the_schema_s(tmp_path: Path) -> None:
    """Else: python -m grpc_tools.protoc -I. --python_out=. lightning_ppdl/rpc/parameter_server.proto"""
    compiled = tmp_path / "schema.bin"
    name = pb.DESCRIPTOR.name
    root = Path(str(SCHEMA).removesuffix(name))
    assert protoc.main(["protoc", f"-I{root}", f"--descriptor_set_out={compiled}", name]) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes())
    checked_in = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(checked_in)
    # The compiler adds the names that JSON would have; the module leaves them out.
    (fresh,) = files.file
    for described in (fresh, checked_in):
        for message in described.message_type:
            _forget_json_names(message)
    assert checked_in == fresh


def _forget_json_names(message: Any) -> None:
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        _forget_json_names(nested)


def test_every_method_travels_under_the_name_of_the_schema() -> None:
    service = pb.DESCRIPTOR.services_by_name["ParameterServer"]
    assert service.full_name == messages.SERVICE


# Records


def sent(message: Any) -> Any:
    """What arrives of it."""
    return type(message).FromString(message.SerializeToString())


@given(record=manifests)
def test_manifests_arrive(record: Manifest) -> None:
    arrived = messages.manifest_record(sent(messages.manifest_message(record)))
    assert arrived == record and arrived.fingerprint == record.fingerprint


@given(record=memberships)
def test_memberships_arrive(record: Membership) -> None:
    assert messages.membership_record(sent(messages.membership_message(record))) == record


@given(record=st.builds(Receipt, counters, counters, counters))
def test_receipts_arrive(record: Receipt) -> None:
    assert messages.receipt_record(sent(messages.receipt_message(record))) == record


@given(record=statuses)
def test_statuses_arrive(record: ServerStatus) -> None:
    assert messages.status_record(sent(messages.status_message(record))) == record


@given(record=requests)
def test_requests_for_a_download_arrive(record: DownloadRequest) -> None:
    message = sent(messages.download_message("secret", record))
    assert message.session == "secret" and messages.download_record(message) == record


@given(values=st.lists(st.floats(width=32), max_size=20))
def test_vectors_arrive_bit_by_bit(values: list[float]) -> None:
    vector = np.array(values, np.float32)
    got = messages.vector_record(vector.astype("<f4").tobytes())
    assert got.dtype == np.float32 and got.tobytes() == vector.tobytes()


@settings(max_examples=30)
@given(length=st.integers(0, 3 * messages.PART_BYTES), data=st.data())
def test_long_messages_arrive_in_parts(length: int, data: st.DataObject) -> None:
    message = np.random.default_rng(length).bytes(length)
    declared = data.draw(st.none() | manifests)
    parts = [sent(part) for part in messages.parts(message, "secret", declared)]
    assert parts[0].session == "secret" and parts[0].total_bytes == length
    assert parts[0].HasField("manifest") == (declared is not None)
    assert max(part.ByteSize() for part in parts[1:] or [pb.Part()]) < 1.01 * messages.PART_BYTES
    assembly = messages.Assembly(length)
    for part in parts:
        assembly.add(part)
    assert assembly.take() == message
    if length:
        with pytest.raises(OverflowError, match="more than"):
            messages.Assembly(length - 1).add(parts[0])


def test_an_assembly_that_is_not_whole() -> None:
    with pytest.raises(EOFError, match="0 bytes arrived of 0"):
        messages.Assembly(10).take()
    assembly = messages.Assembly(10)
    assembly.add(pb.Part(total_bytes=0))
    assert assembly.take() == b""


@given(raw=st.binary(max_size=200))
def test_whatever_arrives_is_a_message_or_named_unreadable(raw: bytes) -> None:
    for kind in (pb.JoinRequest, pb.Part, pb.UploadRequest, pb.TakeTurnRequest, pb.StatusReply):
        read = messages.parser(kind)(raw)
        assert read is messages.UNREADABLE or isinstance(read, kind)


@pytest.mark.parametrize("lease", [0.0, -1.0, math.nan, math.inf])
def test_a_membership_must_be_one_to_go_on_from(lease: float) -> None:
    with pytest.raises(ValueError, match="lease_seconds"):
        messages.membership_record(pb.JoinReply(session="s", lease_seconds=lease))
    with pytest.raises(ValueError, match="last_round="):
        messages.membership_record(pb.JoinReply(session="s", lease_seconds=1.0, last_round=2**62))


# Errors

RAISED = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.PPDLError) and kind.__module__ == errors.__name__
]
# What a server has participants raise. The others are a participant's own affair, or its server's.
SENT = {
    *(kind for kind in RAISED if issubclass(kind, errors.AdmissionError)),
    errors.ConfigurationError,
    errors.FingerprintMismatchError,
    errors.MergeError,
    errors.ServerClosedError,
    errors.ServerFailedError,
    errors.ServerUnavailableError,
    errors.StateWriteError,
}


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_code_and_comes_back(kind: type[errors.PPDLError]) -> None:
    code = failures.code_of(kind("words"))
    assert hasattr(grpc.StatusCode, code) and code not in ("OK", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED")
    back = failures.error_of(code, kind.__name__, "words", "grpc://x:1")
    assert str(back) == "words"
    assert type(back) is (kind if kind in SENT else errors.ServerFailedError)
    # What the server said is said once; only what is not settled is asked again.
    again = kind in (errors.ServerUnavailableError, errors.StateWriteError)
    assert failures.may_pass(code, kind.__name__, "words") == again


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_code_without_a_name_is_an_error_that_names_the_server(code: str) -> None:
    error = failures.error_of(code, None, "words", "grpc://x:1")
    assert "grpc://x:1" in str(error) and "words" in str(error)
    passing = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL", "RESOURCE_EXHAUSTED"}
    assert failures.may_pass(code, None, "words") == (code in passing)
    if code in passing:
        assert type(error) is errors.ServerUnavailableError


@pytest.mark.parametrize("name", ["", "annotations", "Exception", "PPDLError", "__builtins__", "OfALater"])
def test_names_that_are_no_errors_of_a_server(name: str) -> None:
    refused = failures.error_of("INVALID_ARGUMENT", name, "words", "grpc://x:1")
    failed = failures.error_of("INTERNAL", name, "words", "grpc://x:1")
    assert (type(refused), type(failed)) == (errors.AdmissionError, errors.ServerFailedError)
    assert not failures.may_pass("UNAVAILABLE", name, "words")


def test_what_a_server_says_is_printable_and_short() -> None:
    said = "\x1b[2J\r\n\0" + "x" * 10**6
    for name in (None, "JoinRefusedError"):
        text = str(failures.error_of("UNAVAILABLE", name, said, "grpc://x:1"))
        assert text.isprintable() and len(text) < 2500
