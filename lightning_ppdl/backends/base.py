"""What a participant needs of a connection to a parameter server."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import (
    DownloadRequest,
    Manifest,
    Membership,
    Receipt,
    ServerStatus,
    Vector,
)

log = logging.getLogger(__name__)


class Backend(ABC):
    """One participant's connection. Updates and downloads cross it as encoded bytes.

    Args:
        url: The address it connects to, as the user wrote it.

    Every method may raise :class:`~lightning_ppdl.errors.ServerUnavailableError` (try again),
    :class:`~lightning_ppdl.errors.ServerClosedError` (do not), or the server's
    :class:`~lightning_ppdl.errors.AdmissionError`.
    """

    patience_seconds: float = 600.0
    """How long a request that does not get through is tried again, where it can be."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tell: Callable[[str], None] = log.warning
        """Told, in words for people, of whatever makes this connection wait."""

    @abstractmethod
    def join(self, participant: str, manifest: Manifest) -> Membership:
        """Enter the collaboration, or come back to it."""

    @abstractmethod
    def offer_initial(self, vector: Vector) -> bool:
        """Offer the first shared parameters, float32 (P,), to a server that has none.

        Returns:
            Whether they were taken; another participant's offer may have come first.
        """

    @abstractmethod
    def take_turn(self, timeout_seconds: float) -> None:
        """Wait until this participant may start its round.

        Raises:
            TurnTimeoutError: after ``timeout_seconds``, naming who has the turn.
        """

    @abstractmethod
    def renew_turn(self) -> None:
        """Say that this participant is still at work on its round."""

    @abstractmethod
    def end_turn(self) -> None:
        """Pass the turn on without an upload."""

    @abstractmethod
    def download(self, request: DownloadRequest) -> bytes | bytearray:
        """Parameters as one encoded message (:func:`lightning_ppdl.wire.decode_download`)."""

    @abstractmethod
    def upload(self, message: bytes) -> Receipt:
        """Send one encoded update; sending the same bytes again merges nothing twice."""

    @abstractmethod
    def leave(self) -> None:
        """Take no more turns, and close the connection. Does nothing the second time."""

    @abstractmethod
    def status(self) -> ServerStatus:
        """The server at a glance; needs no join."""

    @abstractmethod
    def export(self) -> tuple[Manifest, bytes | bytearray]:
        """What is shared, and its present values as one encoded, complete download; needs no join."""


def split_url(url: str) -> SplitResult:
    """``urlsplit``, whose own errors name neither the argument nor what to write instead.

    Raises:
        ConfigurationError: if ``url`` is no URL at all.
    """
    try:
        if isinstance(url, str):
            return urlsplit(url)
        problem = f"it is a {type(url).__name__}"
    except ValueError as error:
        problem = str(error)
    raise ConfigurationError(f"server={url!r} must be a URL such as 'memory://study': {problem}")
