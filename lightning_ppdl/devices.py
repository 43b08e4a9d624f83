"""Sparse vectors between a GPU and the host: one copy each, since each waits for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl.records import Indices, Vector


def to_host(indices: Tensor, values: Tensor) -> tuple[Indices, Vector]:
    """Entries of a vector, to be sent.

    Args:
        indices: int64 (k,).
        values: float32 (k,), on the same device.
    """
    if values.device.type != "cpu":
        indices, values = unpacked(packed(indices, values).cpu())
    return indices.numpy(), np.ascontiguousarray(values.numpy())


def to_device(indices: Indices | None, values: Vector, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """What was received, on ``device``; without ``indices`` it is a whole vector."""
    received = torch.from_numpy(values)
    if indices is None:
        return None, received.to(device)
    if device.type == "cpu":
        return torch.from_numpy(indices), received
    return unpacked(packed(torch.from_numpy(indices), received).to(device))


def packed(indices: Tensor, values: Tensor) -> Tensor:
    """int32 (3 k,): both, bit by bit."""
    return torch.cat([indices.contiguous().view(torch.int32), values.contiguous().view(torch.int32)])


def unpacked(both: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`packed` was given."""
    entries = len(both) // 3
    return both[: 2 * entries].view(torch.int64), both[2 * entries :].view(torch.float32)
