"""What error feedback keeps: the part of a participant's updates that was not sent."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import Download, SparseUpdate


class Residual:
    """One participant's residual; see :class:`~lightning_ppdl.selection.ErrorFeedback`.

    A round is :meth:`start_from`, :meth:`added_to`, and once its release is on the way, :meth:`sent`. Until
    then nothing has changed: a round that fails in between can be begun anew.

    Args:
        ahead: lambda, in [0, 1].
    """

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead
        self._total: Tensor | None = None
        self.values: Tensor | None = None
        """float32 (P,), never changed in place; None while nothing is due."""

    def start_from(self, downloaded: Tensor, download: Download) -> Tensor:
        """Where local training starts.

        Args:
            downloaded: float32 (P,): the parameters after the download. Left as they are.
            download: What has overwritten all of them, or some: only those lack what was not sent.
        """
        if self.values is None or not self._ahead:
            return downloaded
        step = self._ahead * self.values.to(downloaded.device)
        if download.complete or download.indices is None:
            return downloaded + step
        start = downloaded.clone()
        overwritten = torch.from_numpy(download.indices).to(start.device)
        start[overwritten] += step[overwritten]
        return start

    def added_to(self, delta: Tensor) -> Tensor:
        """``delta``, float32 (P,), and what is due: what entries are to be chosen from."""
        self._total = delta if self.values is None else delta + self.values.to(delta.device)
        return self._total

    def sent(self, update: SparseUpdate) -> None:
        """What :meth:`added_to` gave is on its way, as far as it is in ``update``: the rest stays due.

        Args:
            update: As the server gets it: bounded, and rounded for the way.
        """
        assert self._total is not None, "added_to() comes first"
        self.values = _less(self._total, update)
        self._total = None

    def give_back(self, update: SparseUpdate, size: int) -> None:
        """``update`` was sent, and is known not to be merged: its values are due again; ``size`` is P."""
        kept = torch.zeros(size) if self.values is None else self.values
        self.values = _less(kept, update, sign=-1)

    def restore(self, values: Tensor | None, size: int) -> None:
        """Go on with the :attr:`values` that a checkpoint kept.

        Raises:
            ConfigurationError: if there are not ``size`` of them.
        """
        if values is not None and values.shape != (size,):
            raise ConfigurationError(
                f"the checkpoint keeps a residual of {values.numel()} values, and this participant shares "
                f"{size} parameters: it is of another module, or of another share=...; go on with those, or "
                f"begin anew without the checkpoint"
            )
        self.values = values


def _less(vector: Tensor, update: SparseUpdate, sign: int = 1) -> Tensor:
    """``vector`` minus ``update``, or plus it for a ``sign`` of -1; a copy."""
    made = vector.clone()
    indices, values = (torch.from_numpy(a).to(made.device) for a in (update.indices, update.values))
    made[indices] -= sign * values
    return made
