"""Errors across gRPC: each class has a status code, and its own name travels beside it."""

from __future__ import annotations

from lightning_ppdl import errors

METADATA_KEY = "ppdl-error"

HERE = "this server"
"""What a server calls itself in its messages: only who reads them knows by which address it was reached."""

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
    (errors.ServerUnavailableError, "UNAVAILABLE"),
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

_NO_PROOF = "CERTIFICATE_VERIFY_FAILED"
_NO_TLS = "WRONG_VERSION_NUMBER"
_NO_PEM = "Failed to create security handshaker"
_LASTING = (_NO_PROOF, _NO_TLS, _NO_PEM, "larger than max")
"""Words of gRPC's own, under the same codes, for what will not pass."""

_SENT_BY_SERVERS = {
    errors.ConfigurationError,
    errors.FingerprintMismatchError,
    errors.MergeError,
    errors.ServerClosedError,
    errors.ServerFailedError,
    errors.ServerUnavailableError,
    errors.StateWriteError,
}
"""What a server may have its participants raise, besides its refusals. Budgets, ledgers and what became of
an upload on its way are their own affair."""

_TRY_AGAIN = {errors.StateWriteError.__name__, errors.ServerUnavailableError.__name__}

_REFUSALS = {code for kind, code in _CODES if issubclass(kind, errors.AdmissionError)}
_MOST_SAID = 2000


def code_of(error: errors.PPDLError) -> str:
    """The status code that stands for ``error``."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def error_of(code: str, name: str | None, said: str, url: str) -> errors.PPDLError:
    """The error that a status code and the name beside it stand for.

    Args:
        code: Name of the status code.
        name: Of the error class, None where the server did not answer by itself.
        said: The status's details. Without what is not printable: they end up on a terminal.
        url: The server's address, for messages.
    """
    said = "".join(character if character.isprintable() else " " for character in said[:_MOST_SAID])
    if name is not None:
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and (kind in _SENT_BY_SERVERS or issubclass(kind, errors.AdmissionError)):
            return kind(said.replace(repr(HERE), repr(url)))
        # Of a later version, or none that a server should know of.
        return errors.AdmissionError(said) if code in _REFUSALS else errors.ServerFailedError(said)
    if _NO_PROOF in said:
        return errors.AuthenticationError(
            f"{url!r} did not prove that it is the server of this address: {said}. Give the ca file that its "
            f"operator made, and an address that its certificate names"
        )
    if _NO_TLS in said:
        return errors.ConfigurationError(f"server={url!r} does not speak TLS; use grpc://: {said}")
    if _NO_PEM in said:
        return errors.ConfigurationError(
            f"server={url!r}: ca, certificate and key must be PEM files, and the last two belong "
            f"together: {said}"
        )
    if code == "UNIMPLEMENTED":
        return errors.ConfigurationError(
            f"server={url!r} is no parameter server of this version of lightning_ppdl: {said}"
        )
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return errors.AuthenticationError(f"{url!r}: {said}")
    if code == "UNAVAILABLE" and "Socket closed" in said:
        said += (
            " (the server ended; or it speaks TLS, and this is no grpcs://; or it refuses this certificate)"
        )
    return errors.ServerUnavailableError(f"{url!r} did not answer ({code}): {said}")


def may_pass(code: str, name: str | None, said: str) -> bool:
    """Whether the same request, sent again, may well succeed."""
    if name is not None:
        return code == "UNAVAILABLE" and name in _TRY_AGAIN
    return code in _PASSING and not any(words in said for words in _LASTING)
