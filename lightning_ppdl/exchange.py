"""What crosses between one participant and its server: turns, downloads, uploads; and how long that takes."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from lightning_ppdl.backends import Backend
from lightning_ppdl.base import Base
from lightning_ppdl.courier import Courier
from lightning_ppdl.errors import PPDLError, ServerUnavailableError, TurnNotHeldError
from lightning_ppdl.outbox import Outbox
from lightning_ppdl.records import Download, Receipt

log = logging.getLogger(__name__)


class Exchange:
    """One participant's exchanges, one at a time.

    Args:
        backend: The connection.
        participant: For messages.
        base: What was downloaded last.
        outbox: What was not answered yet.
        turn_timeout_seconds: The longest to wait for a turn.
    """

    def __init__(
        self, backend: Backend, participant: str, base: Base, outbox: Outbox, turn_timeout_seconds: float
    ) -> None:
        self.backend = backend
        self.base = base
        self.outbox = outbox
        self.lease_seconds = 0.0
        """How long the server waits for a sign of life."""
        self.wait_seconds = 0.0
        """Of the round, for the turn."""
        self.seconds = 0.0
        """Of the round, for all else."""
        self.downloaded_bytes = 0
        """Of the round."""
        self._participant = participant
        self._turn_timeout_seconds = turn_timeout_seconds
        self._renewed_at = 0.0
        self._courier: Courier | None = None

    def take_turn(self) -> None:
        """Upload what is still due, and wait for the turn: a round begins."""
        started = time.perf_counter()
        self.outbox.send_again(self._turn_timeout_seconds)
        self.backend.take_turn(self._turn_timeout_seconds)
        self._renewed_at = time.perf_counter()
        self.wait_seconds = self._renewed_at - started
        self.seconds, self.downloaded_bytes = 0.0, 0

    def keep_turn(self, round: int) -> None:
        """Give a sign of life in the middle of a round; cheap enough for every batch."""
        now = time.perf_counter()
        if now - self._renewed_at < self.lease_seconds / 4 or self._courier is not None:
            return
        self._renewed_at = now
        try:
            self.backend.renew_turn()
        except TurnNotHeldError as error:
            log.warning("round %d will not be merged: %s", round, error)
        except ServerUnavailableError as error:
            # One sign of life that got lost is no reason to stop; the upload will tell.
            log.info("the turn could not be renewed: %s", error)

    def download(self, local: Tensor) -> tuple[Tensor, Download]:
        """See :meth:`Base.take`."""
        started = time.perf_counter()
        taken = self._take(self.backend.download(self.base.request()), local)
        self.seconds += time.perf_counter() - started
        return taken

    def begin_in_flight(self, message: bytes) -> None:
        """Upload ``message`` and fetch the next download on the way, while training goes on."""
        self._courier = Courier(self.backend, message, self.base.request(), self._turn_timeout_seconds)

    @property
    def in_flight(self) -> bool:
        """Whether an exchange is on its way: :meth:`receipt` is due."""
        return self._courier is not None

    def receipt(self) -> tuple[Receipt | None, Courier]:
        """Wait for the answer to the upload that is on its way.

        Returns:
            It, None if the update was not merged, or that is not known; and who has the download, for
            :meth:`arrived`.
        """
        assert self._courier is not None
        courier, self._courier = self._courier, None
        return self.outbox.settle(courier.message, courier.receipt), courier

    def arrived(self, courier: Courier, local: Tensor) -> tuple[Tensor, Download]:
        """Wait for the download that is on its way; see :meth:`Base.take`."""
        started = time.perf_counter()
        taken = self._take(courier.download(), local)
        self.wait_seconds, self.seconds = 0.0, time.perf_counter() - started
        return taken

    def leave(self) -> None:
        """Close the connection, once what is on its way has been answered."""
        try:
            if self._courier is not None:
                self.receipt()
        except PPDLError as error:
            log.warning("the last update of participant %r was refused: %s", self._participant, error)
        finally:
            self.backend.leave()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        # Sent once more, what did arrive is answered as it was then.
        unsent = self.outbox.unsent if self._courier is None else self._courier.message
        return {
            "unsent": None if unsent is None else torch.frombuffer(bytearray(unsent), dtype=torch.uint8),
            **self.base.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, among other keys."""
        self.base.load_state_dict(state)
        if (unsent := state.get("unsent")) is not None:
            self.outbox.unsent = unsent.numpy().tobytes()

    def _take(self, message: bytes | bytearray, local: Tensor) -> tuple[Tensor, Download]:
        self.downloaded_bytes = len(message)
        return self.base.take(message, local)
