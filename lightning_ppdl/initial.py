"""What a collaboration starts from: a public seed, a file, or one participant's own parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.tensorfile import read_vector

Initial = int | str | Path


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

    Nothing of the module's present values, which may have seen private data, enters the result;
    the module itself is left as it was, and so is the global generator.

    Returns:
        float32 (P,), on the CPU.

    Raises:
        ConfigurationError: if a shared tensor belongs to a layer without ``reset_parameters``.
    """
    resets: dict[str, Callable[[], object]] = {}
    for prefix, layer in module.named_modules():
        # nn.MultiheadAttention keeps its own under a private name
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            resets[prefix] = reset
    unreachable = [spec.name for spec in layout.specs if spec.name.rpartition(".")[0] not in resets]
    if unreachable:
        raise ConfigurationError(
            f"initial={seed!r} (a public seed) cannot set {unreachable[0]!r}"
            f"{f' and {len(unreachable) - 1} more' if len(unreachable) > 1 else ''}: its layer has no "
            f"reset_parameters(). Add one, give initial='FILE.safetensors' with public values, or give "
            f"initial='own' to start from this module's values (they leave this machine un-noised)"
        )
    device = next(module.parameters()).device
    # Drawn on the CPU wherever the module is: other devices draw other values from the same seed.
    module.cpu()
    before = [tensor.detach().clone() for tensor in (*module.parameters(), *module.buffers())]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for reset in resets.values():
            reset()
        vector = layout.flatten()
        for tensor, value in zip((*module.parameters(), *module.buffers()), before, strict=True):
            tensor.copy_(value)
    module.to(device)
    return vector
