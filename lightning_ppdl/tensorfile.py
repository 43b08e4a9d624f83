"""Shared parameters in a file: safetensors, one tensor a parameter, under the module's own names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import ParameterSpec, Vector


def read_vector(path: str | Path, specs: Sequence[ParameterSpec]) -> Vector:
    """Read the named tensors as one flat vector; other tensors in the file are ignored.

    Args:
        path: A ``.safetensors`` file.
        specs: Which tensors, in which order.

    Returns:
        float32 (P,).

    Raises:
        ConfigurationError: if the file cannot be read, or lacks a tensor of that name and shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"initial={str(path)!r} cannot be read as a safetensors file: {error}. Write it with "
            f"safetensors.torch.save_file(module.state_dict(), ...)"
        ) from error
    for spec in specs:
        if spec.name not in tensors or tensors[spec.name].shape != spec.shape:
            found = tensors[spec.name].shape if spec.name in tensors else "nothing"
            raise ConfigurationError(
                f"initial={str(path)!r} must hold {spec.name!r} of shape {list(spec.shape)}; found {found}"
            )
    return np.concatenate([tensors[spec.name].reshape(-1).astype(np.float32) for spec in specs])
