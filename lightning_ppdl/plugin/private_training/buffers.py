"""Buffers that training has to leave alone: data in them would leave without noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ppdl.errors import ConfigurationError


@dataclass(frozen=True)
class _Seen:
    """A buffer as it was; holding it keeps its identity from being given to another tensor."""

    buffer: Tensor
    version: int
    values: Tensor


class ConstantBuffers:
    """The buffers of ``module`` as they are now, but for those of torchmetrics, which train nothing.

    Args:
        module: What is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen = {
            name: _Seen(buffer, _version(buffer), buffer.detach().clone())
            for name, buffer in _buffers(module)
        }

    def require_unchanged(self, by_value: bool = False) -> None:
        """Refuse what was written to, replaced or added since.

        Args:
            by_value: Whether to compare all values too. What is written through ``.data`` or numpy shows in
                no other way; on an accelerator it waits for the device.

        Raises:
            ConfigurationError: naming the buffer.
        """
        for name, buffer in _buffers(self._module):
            seen, version = self._seen.get(name), _version(buffer)
            if seen is not None:
                if buffer is seen.buffer and version == seen.version and not by_value:
                    continue
                # Also a move to a device and a loading of the same values replace or write.
                if _equal(buffer, seen.values):
                    self._seen[name] = _Seen(buffer, version, seen.values)
                    continue
            raise ConfigurationError(
                f"training changed the buffer {name!r}: what data leave there carries no noise, and what is "
                f"trained with it follows from them. Set buffers before the first batch, from public values, "
                f"and keep what only measures in a torchmetrics.Metric"
            )


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        if part._buffers and not isinstance(part, Metric):
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    yield f"{path}.{name}" if path else name, buffer


def _version(buffer: Tensor) -> int:
    # Tensors made in inference mode, as in validation, count no writes, and training cannot write to them.
    return 0 if buffer.is_inference() else buffer._version


def _equal(buffer: Tensor, values: Tensor) -> bool:
    if buffer.shape != values.shape or buffer.dtype != values.dtype:
        return False
    values = values.to(buffer.device)
    return bool(torch.all((buffer == values) | ((buffer != buffer) & (values != values))))
