"""An exchange that goes on while training does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from lightning_ppdl.backends import Backend
from lightning_ppdl.errors import ServerUnavailableError, UploadLostError
from lightning_ppdl.records import DownloadRequest, Receipt


class Courier:
    """Carries one update to the server, and then a download back, on a thread of its own.

    Args:
        backend: Used by nobody else until both have come.
        message: The update, encoded.
        request: What to download after it.
        turn_timeout_seconds: The longest to wait in between.
    """

    def __init__(
        self, backend: Backend, message: bytes, request: DownloadRequest, turn_timeout_seconds: float
    ) -> None:
        self.message = message
        self._backend, self._request = backend, request
        self._turn_timeout_seconds = turn_timeout_seconds
        thread = ThreadPoolExecutor(1, thread_name_prefix="courier")
        self._receipt = thread.submit(backend.upload, message)
        self._download = thread.submit(self._fetch)
        thread.shutdown(wait=False)

    def receipt(self) -> Receipt:
        """The upload's, once it is here; raises what it raised."""
        return self._receipt.result()

    def download(self) -> bytes | bytearray:
        """The download, once it is here; raises what it raised."""
        return self._download.result()

    def _fetch(self) -> bytes | bytearray:
        error = self._receipt.exception()
        if isinstance(error, ServerUnavailableError) and not isinstance(error, UploadLostError):
            raise error  # not once more through all the patience
        self._backend.take_turn(self._turn_timeout_seconds)
        return self._backend.download(self._request)
