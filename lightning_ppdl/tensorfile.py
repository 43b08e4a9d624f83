"""Shared parameters in a file: safetensors, one tensor a parameter, under the module's own names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import ParameterSpec, Vector

SUFFIX = ".safetensors"


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
    import torch  # here, as records can be had without it; numpy knows no bfloat16

    parts = []
    with _opened(path) as file:
        names = set(file.keys())
        for spec in specs:
            shape = tuple(file.get_slice(spec.name).get_shape()) if spec.name in names else None
            if shape != spec.shape:
                found = "nothing" if shape is None else list(shape)
                raise ConfigurationError(
                    f"initial={str(path)!r} must hold {spec.name!r} of shape {list(spec.shape)}; found "
                    f"{found}"
                )
            parts.append(file.get_tensor(spec.name).reshape(-1).to(torch.float32).numpy())
        # Within the file's context: tensors that were float32 before are views of it.
        return np.concatenate(parts)


def require_tensor_file(path: str | Path) -> None:
    """Look whether :func:`read_vector` will find a safetensors file, before anybody knows which tensors.

    Raises:
        ConfigurationError: if it will not.
    """
    with _opened(path):
        pass


def write_vector(
    path: str | Path,
    vector: Vector,
    specs: Sequence[ParameterSpec],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one flat vector as named tensors, each of its own shape and dtype: for :func:`read_vector`, and
    for ``module.load_state_dict(safetensors.torch.load_file(path), strict=False)``.

    The file is there as a whole or not at all. Values beyond a dtype's range become infinite in it, as they
    do where a module of that dtype takes part.

    Args:
        path: A ``.safetensors`` file, in a directory that is there.
        vector: float32 (P,).
        specs: The tensors that it consists of, in their order.
        metadata: Kept in the file's header.
        overwrite: Replace a file that is there.

    Raises:
        ConfigurationError: for a path that cannot be written, a file that is there, a vector of another
            size, or a dtype that torch does not have.
    """
    import torch
    from safetensors.torch import save_file

    path = require_writable(path, overwrite)
    if vector.shape != (size := sum(spec.size for spec in specs),):
        raise ConfigurationError(
            f"vector of shape {vector.shape} must have the shape {(size,)} of its tensors"
        )
    tensors, start = {}, 0
    for spec in specs:
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigurationError(
                f"parameter {spec.name!r} has the dtype {spec.dtype!r}, which torch {torch.__version__} does "
                f"not have; write it with the version that the participants use"
            )
        values = torch.from_numpy(vector[start : start + spec.size]).reshape(spec.shape)
        tensors[spec.name] = values.to(dtype, copy=True)  # the format allows no two views of one storage
        start += spec.size
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        save_file(tensors, partial, {"format": "pt", **(metadata or {})})
        partial.chmod(mode)  # what the umask says; the library lets nobody else read its files
        _sync(partial)
        require_writable(path, overwrite)  # again: it may have appeared meanwhile
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"file={str(path)!r} cannot be written ({error}); see that its directory has space and can be "
            f"written to"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def require_writable(path: str | Path, overwrite: bool) -> Path:
    """Return ``path`` if :func:`write_vector` may write there, as far as can be told before.

    Raises:
        ConfigurationError: naming the argument ``file`` and what is in the way.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ConfigurationError(f"file={str(path)!r} must end in {SUFFIX}, e.g. file='model{SUFFIX}'")
    if not path.parent.is_dir():
        raise ConfigurationError(f"file={str(path)!r}: there is no directory {path.parent}; make it first")
    if path.is_dir():
        raise ConfigurationError(f"file={str(path)!r} is a directory; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise ConfigurationError(
            f"file={str(path)!r} is there already; give another name, or overwrite=true to replace it"
        )
    return path


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"initial={str(path)!r} cannot be read as a safetensors file: {error}. Write it with "
            f"safetensors.torch.save_file(module.state_dict(), ...)"
        ) from error


def _sync(path: Path) -> None:
    """Onto the disk, before it takes another file's place."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
