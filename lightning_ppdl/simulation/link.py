"""A participant's connection in a simulation: its speed and its losses, on the scheduler's clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.errors import TurnNotHeldError, UploadLostError
from lightning_ppdl.records import Receipt
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.simulation.scheduler import Scheduler


class SimulatedLink(MemoryBackend):
    """The memory backend, with local training that takes virtual time and uploads that may get lost.

    Args:
        url: The server's name, for messages.
        server: The server.
        scheduler: Suspends and resumes this participant.
        round_seconds: Virtual seconds from a round's download to its upload.
        drop_probability: Chance that an upload never reaches the server.
        generator: Draws the losses.
        after_upload: Called after each upload, with its receipt, or None if it was lost or too late.
    """

    def __init__(
        self,
        url: str,
        server: ParameterServer,
        scheduler: Scheduler,
        round_seconds: float,
        drop_probability: float,
        generator: np.random.Generator,
        after_upload: Callable[[Receipt | None], None],
    ) -> None:
        super().__init__(url, server, scheduler.wait)
        self._scheduler = scheduler
        self._round_seconds = round_seconds
        self._drop_probability = drop_probability
        self._generator = generator
        self._after_upload = after_upload

    def upload(self, message: bytes) -> Receipt:
        self._scheduler.sleep(self._round_seconds)
        if self._generator.random() < self._drop_probability:
            self.end_turn()
            self._after_upload(None)
            raise UploadLostError("the simulated link dropped this upload")
        try:
            receipt = super().upload(message)
        except TurnNotHeldError:
            self._after_upload(None)
            raise
        self._after_upload(receipt)
        return receipt
