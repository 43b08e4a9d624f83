"""One request at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ppdl.errors import (
    AdmissionError,
    ConfigurationError,
    FingerprintMismatchError,
    ServerClosedError,
)
from lightning_ppdl.server.holdings import Holdings
from lightning_ppdl.server.uploads import Uploads


class Requests:
    """Lets requests at what a server holds, one after the other, after what the passing of time has changed.

    Args:
        held: What they read and change.
        uploads: Merges the cycles that time ends.
        durable: Whether there is a state directory, which has to be opened before the first request.
    """

    def __init__(self, held: Holdings, uploads: Uploads, durable: bool) -> None:
        self._held = held
        self._uploads = uploads
        self._durable = durable

    @contextmanager
    def look(self) -> Iterator[None]:
        """For whoever reads what is held, also after the end."""
        with self._held.changed:
            if not self._held.closed:
                self._uploads.merge_due()
            yield

    @contextmanager
    def request(self) -> Iterator[None]:
        """For a participant's request, which is counted if refused, and may change whose turn it is.

        Raises:
            ServerClosedError: if the server was closed, or not opened.
        """
        with self.look():
            if self._held.closed:
                raise ServerClosedError(
                    "the parameter server was closed; serve a new one under this name to go on"
                )
            if self._durable and self._held.durability is None:
                raise ServerClosedError("the parameter server was not opened; call its open() first")
            try:
                yield
            except (AdmissionError, ConfigurationError, FingerprintMismatchError) as error:
                self._held.books.traffic.reject(type(error).__name__)
                raise
            finally:
                self._held.note_turns()
