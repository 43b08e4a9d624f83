"""What has been released and not been answered yet: sent again, as the same bytes, until it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from lightning_ppdl.backends import Backend
from lightning_ppdl.errors import (
    RoundSeenBeforeError,
    ServerUnavailableError,
    TurnNotHeldError,
    UploadLostError,
)
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.records import Receipt

log = logging.getLogger(__name__)


class Outbox:
    """Sends one participant's uploads, and keeps the last one while it is not known whether it arrived.

    Args:
        backend: Where to.
        participant: For messages.
        account: Its ledger keeps the bytes of private releases, beyond the life of this process.
    """

    def __init__(self, backend: Backend, participant: str, account: Account | None) -> None:
        self._backend = backend
        self._participant = participant
        self._account = account
        self.unsent: bytes | None = None
        """What was not answered."""
        self._lost: bytes | None = None

    def restore(self) -> None:
        """Take over what an earlier life of this participant released and may not have sent."""
        if self._account is not None:
            self.unsent = self._account.unsent()

    def send(self, message: bytes) -> Receipt | None:
        """Upload ``message``; None if it was not merged, or that is not known."""
        return self.settle(message, partial(self._backend.upload, message))

    def settle(self, message: bytes, receipt_of: Callable[[], Receipt]) -> Receipt | None:
        """Likewise, where somebody else uploads ``message``, and ``receipt_of`` gives what came of it."""
        try:
            receipt = receipt_of()
        except (TurnNotHeldError, RoundSeenBeforeError, UploadLostError) as error:
            log.warning("participant %r: an update was not merged: %s", self._participant, error)
            receipt = None
            # The server may well have merged this one, and a later one since.
            self._lost = None if isinstance(error, RoundSeenBeforeError) else message
        except ServerUnavailableError as error:
            log.warning(
                "participant %r: an update was not answered, and is sent again before the next round: %s",
                self._participant,
                error,
            )
            self.unsent = message
            return None
        self.forget()
        return receipt

    def send_again(self, turn_timeout_seconds: float) -> None:
        """Upload what was not answered, if anything: in a turn of its own.

        Raises:
            ServerUnavailableError: if it is not answered this time either.
        """
        if self.unsent is None:
            return
        log.info("participant %r: uploading what was released before", self._participant)
        self._backend.take_turn(turn_timeout_seconds)
        self.send(self.unsent)
        if self.unsent is not None:
            raise ServerUnavailableError(f"{self._backend.url!r} does not answer the upload that is due")

    def take_lost(self) -> bytes | None:
        """The last upload, if the server is known not to have it and it is not sent again; once."""
        lost, self._lost = self._lost, None
        return lost

    def forget(self) -> None:
        """The last upload was answered, or is for nobody any more."""
        self.unsent = None
        if self._account is not None:
            self._account.settled()
