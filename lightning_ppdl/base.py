"""What a participant holds of the server's parameters: what it downloaded last."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_ppdl import wire
from lightning_ppdl.devices import to_device
from lightning_ppdl.records import Download, DownloadRequest, ValueType


class Base:
    """The base of a participant's next update.

    Args:
        size: P.
        fraction: theta_d in (0, 1]: the share of the parameters that a download asks for.
        dtype: How values travel.
    """

    def __init__(self, size: int, fraction: float, dtype: ValueType) -> None:
        self._size = size
        self._fraction = fraction
        self._dtype = dtype
        self.version: int | None = None
        """The server's, of the last download."""
        self._vector: Tensor | None = None
        self._complete = False

    def request(self) -> DownloadRequest:
        """What to ask the server for."""
        # Who held a mixture so far, and asks for everything now (resumed with another theta_d), has no
        # whole vector that changes could be sent over.
        known = self.version if self._complete or self._fraction < 1 else None
        return DownloadRequest(self._fraction, known, self._dtype)

    def take(self, message: bytes | bytearray, local: Tensor) -> tuple[Tensor, Download]:
        """Take in the server's answer.

        Args:
            message: As it came.
            local: float32 (P,): what the participant has made of its parameters.

        Returns:
            float32 (P,): ``local``, overwritten by the download, on its device and not to be changed; and the
            download.
        """
        download = wire.decode_download(message, self._size)
        indices, values = to_device(download.indices, download.values, local.device)
        if indices is None:
            vector = values
        else:
            # A complete download in sparse form is relative to the last one, a partial one to what the
            # participant has made of its parameters since.
            held = self._vector if download.complete else local
            assert held is not None
            vector = held.to(local.device, copy=True)
            vector[indices] = values
        self._vector, self.version, self._complete = vector, download.version, download.complete
        return vector, download

    def forget(self) -> None:
        """What was downloaded is no base for anything any more."""
        self.version = self._vector = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        return {"version": self.version, "base": self._vector, "complete": self._complete}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, among other keys."""
        self.version, self._vector, self._complete = state["version"], state["base"], state["complete"]
