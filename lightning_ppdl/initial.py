"""What a collaboration starts from: a public seed, a file, or one participant's own parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.tensorfile import read_vector

log = logging.getLogger(__name__)

Initial = int | str | Path


def check_initial(initial: Initial) -> Initial:
    """Return ``initial`` if it has one of the forms that :func:`initial_vector` takes."""
    is_seed = isinstance(initial, int) and not isinstance(initial, bool) and 0 <= initial < 2**63
    is_file = isinstance(initial, str | Path) and Path(initial).suffix == ".safetensors"
    if not is_seed and not is_file and initial != "own":
        raise ConfigurationError(
            f"initial={initial!r} must be a public seed (a whole number, 0 or more), the path of a "
            f".safetensors file, or 'own'"
        )
    return initial


def initial_vector(initial: Initial, module: nn.Module, layout: ParameterLayout) -> Tensor:
    """The first shared parameters.

    Args:
        initial: A public seed; the path of a ``.safetensors`` file; or ``"own"``: the module's values
            as they are, which leave this machine un-noised.
        module: The module, left as it was.
        layout: What of it is shared.

    Returns:
        float32 (P,).
    """
    if initial == "own":
        return layout.flatten()
    if isinstance(initial, int):
        return public_initial(module, layout, initial)
    return torch.from_numpy(read_vector(initial, layout.specs))


def public_initial(module: nn.Module, layout: ParameterLayout, seed: int) -> Tensor:
    """The parameters every party can compute: ``reset_parameters()`` of all layers under ``seed``.

    Nothing of the module's present values, which may have seen private data, enters the result; the
    module itself is left as it was, and the global generator is neither read nor changed.

    Returns:
        float32 (P,), on the CPU.

    Raises:
        ConfigurationError: if a shared tensor is not set by its layer's ``reset_parameters()``.
    """
    own = layout.flatten()
    device = own.device
    # Drawn on the CPU wherever the module is: other devices draw other values from the same seed.
    module.cpu()
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors(module)}
    try:
        with torch.no_grad(), _Drawing(torch.Generator().manual_seed(seed)):
            # What is still NaN afterwards was not reset, whatever its layer promises.
            layout.assign(torch.full((layout.size,), torch.nan))
            for layer in module.modules():
                _reset(layer)
        vector = layout.flatten()
    finally:
        _restore(module, before)
        module.to(device)
    missed = layout.names_where(torch.isnan(vector))
    if missed:
        others = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        raise ConfigurationError(
            f"initial={seed!r} (a public seed) cannot set {missed[0]!r}{others}: no reset_parameters() does. "
            f"Add one to its layer, give initial='FILE.safetensors' with public values, or give "
            f"initial='own' to start from this module's values (they leave this machine un-noised)"
        )
    own_zero = {spec.name for spec in layout.specs} - set(layout.names_where(own != 0))
    if undone := [name for name in layout.names_where(vector != 0) if name in own_zero]:
        log.warning(
            "initial=%r (a public seed) gives %s%s random values, where this module has zeros: if these are "
            "on purpose, as an adapter's are, give initial='own', or a file with the module's values",
            seed,
            repr(undone[0]),
            f" and {len(undone) - 1} more tensors" if len(undone) > 1 else "",
        )
    return vector


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets every random operation of this thread draw from one generator.

    Seeding the global generator would do in a program of one thread; in others the participants'
    shuffling and this would change each other's numbers.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            if not any(argument.name == "generator" for argument in func._schema.arguments):
                func = getattr(func.overloadpacket, "generator", None)
            if func is None:
                raise ConfigurationError(
                    "a layer's reset_parameters() draws with an operation that takes no generator, so "
                    "initial=SEED cannot repeat it; use torch.nn.init there, or give initial='own' or a file"
                )
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _reset(layer: nn.Module) -> None:
    # nn.MultiheadAttention keeps its own under a private name
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    # A wrapper of torch.compile forwards to the layer that it wraps, whose turn comes by itself.
    if not callable(reset) or "_orig_mod" in layer._modules:
        return
    try:
        reset()
    except TypeError as error:
        raise ConfigurationError(
            f"{type(layer).__name__}.reset_parameters() cannot be called without arguments ({error}); "
            f"initial=SEED needs that. Give initial='own' or a file instead"
        ) from error


def _restore(module: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for name, (tensor, value) in before.items():
            tensor.copy_(value)
            prefix, _, leaf = name.rpartition(".")
            owner = module.get_submodule(prefix)
            if getattr(owner, leaf) is not tensor:  # a reset that made a new parameter
                setattr(owner, leaf, tensor)
