from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ValueType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT32: _ClassVar[ValueType]
    BFLOAT16: _ClassVar[ValueType]
    FLOAT16: _ClassVar[ValueType]
FLOAT32: ValueType
BFLOAT16: ValueType
FLOAT16: ValueType

class ParameterSpec(_message.Message):
    __slots__ = ("name", "shape", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("parameters", "quantity", "upload_fraction", "bound")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FRACTION_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[ParameterSpec]
    quantity: str
    upload_fraction: float
    bound: float
    def __init__(self, parameters: _Optional[_Iterable[_Union[ParameterSpec, _Mapping]]] = ..., quantity: _Optional[str] = ..., upload_fraction: _Optional[float] = ..., bound: _Optional[float] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("participant", "manifest")
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    participant: str
    manifest: Manifest
    def __init__(self, participant: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("session", "study", "version", "last_round", "needs_initial", "lease_seconds", "anytime")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STUDY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    NEEDS_INITIAL_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ANYTIME_FIELD_NUMBER: _ClassVar[int]
    session: str
    study: str
    version: int
    last_round: int
    needs_initial: bool
    lease_seconds: float
    anytime: bool
    def __init__(self, session: _Optional[str] = ..., study: _Optional[str] = ..., version: _Optional[int] = ..., last_round: _Optional[int] = ..., needs_initial: bool = ..., lease_seconds: _Optional[float] = ..., anytime: bool = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("data", "total_bytes", "session", "manifest")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    total_bytes: int
    session: str
    manifest: Manifest
    def __init__(self, data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., session: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("taken",)
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    taken: bool
    def __init__(self, taken: bool = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class EmptyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TakeTurnRequest(_message.Message):
    __slots__ = ("session", "wait_seconds")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    session: str
    wait_seconds: float
    def __init__(self, session: _Optional[str] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class TakeTurnReply(_message.Message):
    __slots__ = ("taken", "awaited")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    taken: bool
    awaited: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, taken: bool = ..., awaited: _Optional[_Iterable[str]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("session", "fraction", "known_version", "dtype")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    session: str
    fraction: float
    known_version: int
    dtype: ValueType
    def __init__(self, session: _Optional[str] = ..., fraction: _Optional[float] = ..., known_version: _Optional[int] = ..., dtype: _Optional[_Union[ValueType, str]] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("session", "update")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    session: str
    update: bytes
    def __init__(self, session: _Optional[str] = ..., update: _Optional[bytes] = ...) -> None: ...

class ReceiptReply(_message.Message):
    __slots__ = ("round", "version", "staleness")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    round: int
    version: int
    staleness: int
    def __init__(self, round: _Optional[int] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("name", "present", "rounds", "idle_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    present: bool
    rounds: int
    idle_seconds: float
    def __init__(self, name: _Optional[str] = ..., present: bool = ..., rounds: _Optional[int] = ..., idle_seconds: _Optional[float] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "parameters", "awaited", "members", "uploads", "uploaded_bytes", "downloaded_bytes", "rejections")
    class RejectionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    UPLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWNLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    version: int
    parameters: int
    awaited: _containers.RepeatedScalarFieldContainer[str]
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    uploads: int
    uploaded_bytes: int
    downloaded_bytes: int
    rejections: _containers.ScalarMap[str, int]
    def __init__(self, version: _Optional[int] = ..., parameters: _Optional[int] = ..., awaited: _Optional[_Iterable[str]] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., uploads: _Optional[int] = ..., uploaded_bytes: _Optional[int] = ..., downloaded_bytes: _Optional[int] = ..., rejections: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
