"""From a request for parameters to the message that holds them."""

from __future__ import annotations

from lightning_ppdl import wire
from lightning_ppdl.records import Download, DownloadRequest, Manifest
from lightning_ppdl.server.books import Member
from lightning_ppdl.server.holdings import Holdings
from lightning_ppdl.validation import require_fraction


class Downloads:
    """Reads the shared parameters for others.

    Args:
        held: What is read; its lock is held by whoever calls a method.
    """

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._dense: tuple[int, str, bytes] | None = None

    def answer(self, member: Member, request: DownloadRequest) -> bytes:
        """What ``member``, who has the turn, asks for.

        Raises:
            TurnNotHeldError: if it does not have the turn.
            ConfigurationError: for a fraction that is none.
        """
        held = self._held
        require_fraction("download fraction", request.fraction)
        # A deadline may have passed since the turn was taken; then this is the next one.
        if not held.turns.take(member.name):
            held.turns.renew(member.name)
        message = self._encoded(held.vector.read(member.name, request), request)
        held.books.traffic.download(len(message))
        return message

    def export(self) -> tuple[Manifest, bytes]:
        """What is shared, and all of its parameters.

        Raises:
            JoinRefusedError: while there are none.
        """
        everything = DownloadRequest(1.0)
        message = self._encoded(self._held.vector.read("", everything), everything)
        assert self._held.vector.manifest is not None  # there are parameters
        return self._held.vector.manifest, message

    def _encoded(self, download: Download, request: DownloadRequest) -> bytes:
        if download.indices is not None:
            return wire.encode_download(download, request.dtype)
        # One copy for however many ask for the same version at the same time.
        if self._dense is None or self._dense[:2] != (download.version, request.dtype):
            message = wire.encode_download(download, request.dtype)
            self._dense = (download.version, request.dtype, message)
        return self._dense[2]
