"""Several processes, one participant: rank zero speaks with the server, the others hear what came of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed
from torch import Tensor

from lightning_ppdl.errors import RankZeroFailedError

Outcome = TypeVar("Outcome")


class Ranks:
    """The processes that train one participant together.

    Args:
        rank: This process's, from 0.
        size: How many there are.
        patience_seconds: The longest that rank zero may keep the others waiting for an exchange.
    """

    def __init__(self, rank: int, size: int, patience_seconds: float) -> None:
        self.is_zero = rank == 0
        self.several = size > 1
        # A group of its own: the one that Lightning makes gives up after half an hour, and its GPU backends
        # earlier still, while a participant may well have to wait longer for its turn.
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=patience_seconds))
            if self.several
            else None
        )

    def zero(self, action: Callable[[], Outcome]) -> Outcome:
        """Run ``action`` on rank zero alone; all ranks have to call this.

        Returns:
            What ``action`` returned, on every rank.

        Raises:
            RankZeroFailedError: on the other ranks, if it raised on rank zero, where its error goes on.
        """
        if self._group is None:
            return action()
        told: list[Outcome | None] = [None]
        failure: list[str | None] = [None]
        try:
            if self.is_zero:
                told[0] = action()
        except BaseException as error:
            failure[0] = f"{type(error).__name__}: {error}"
            raise
        finally:
            message: list[object] = [failure[0], told[0]]
            torch.distributed.broadcast_object_list(message, 0, self._group)
        if message[0] is not None:
            raise RankZeroFailedError(f"rank zero's exchange with the server failed: {message[0]}")
        return message[1]  # type: ignore[return-value]

    def share(self, vector: Tensor) -> Tensor:
        """Rank zero's ``vector``, (P,), on every rank; all have to call this, with one of the same shape."""
        if self._group is None:
            return vector
        # Through the CPU, since the group is gloo's: rank zero has just had it there anyway.
        travelling = vector.cpu().contiguous()
        torch.distributed.broadcast(travelling, 0, self._group)
        return travelling.to(vector.device)

    def close(self) -> None:
        """Part; on each rank by itself, since after an error not all of them may be left."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None
