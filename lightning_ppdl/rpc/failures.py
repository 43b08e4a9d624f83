"""Errors across gRPC: each class has a status code, and its own name travels beside it."""

from __future__ import annotations

from lightning_ppdl import errors

METADATA_KEY = "ppdl-error"

# By base class; the first that fits. Names are those of grpc.StatusCode.
_CODES: tuple[tuple[type[errors.PPDLError], str], ...] = (
    (errors.AuthenticationError, "UNAUTHENTICATED"),
    (errors.LimitExceededError, "RESOURCE_EXHAUSTED"),
    (errors.SessionEndedError, "ABORTED"),
    (errors.UnknownParticipantError, "PERMISSION_DENIED"),
    (errors.JoinRefusedError, "FAILED_PRECONDITION"),
    (errors.FingerprintMismatchError, "FAILED_PRECONDITION"),
    (errors.TurnNotHeldError, "FAILED_PRECONDITION"),
    (errors.ServerClosedError, "FAILED_PRECONDITION"),
    (errors.RoundSeenBeforeError, "ALREADY_EXISTS"),
    (errors.UnknownVersionError, "OUT_OF_RANGE"),
    (errors.IndexOutOfRangeError, "OUT_OF_RANGE"),
    (errors.StateWriteError, "UNAVAILABLE"),
    (errors.AdmissionError, "INVALID_ARGUMENT"),
    (errors.ConfigurationError, "INVALID_ARGUMENT"),
    (errors.PPDLError, "INTERNAL"),
)

_PASSING = {
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "UNKNOWN",
    "INTERNAL",
    "RESOURCE_EXHAUSTED",
}
"""Codes that a broken connection, a proxy or a busy server gives: worth another try."""


def code_of(error: errors.PPDLError) -> str:
    """The status code that stands for ``error``."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def error_of(code: str, name: str | None, said: str, url: str) -> errors.PPDLError:
    """The error that a status code and the name beside it stand for.

    Args:
        code: Name of the status code.
        name: Of the error class, None where the server did not answer by itself.
        said: The status's details.
        url: The server's address, for messages.
    """
    kind = getattr(errors, name or "", None)
    if isinstance(kind, type) and issubclass(kind, errors.PPDLError):
        return kind(said)
    if code == "UNIMPLEMENTED":
        return errors.ConfigurationError(
            f"server={url!r} is no parameter server of this version of lightning_ppdl: {said}"
        )
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return errors.AuthenticationError(f"{url!r}: {said}")
    return errors.ServerUnavailableError(f"{url!r} did not answer ({code}): {said}")


def may_pass(code: str, name: str | None) -> bool:
    """Whether the same request, sent again, may well succeed."""
    return code in _PASSING and name in (None, errors.StateWriteError.__name__)
