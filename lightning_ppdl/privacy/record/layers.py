"""How each kind of layer turns what went in and what came back into per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.record.gradients import Dense, Lookup, Outer, PerExample

Rule: TypeAlias = Callable[[Any, Sequence[Any], Tensor], Mapping[nn.Parameter, PerExample]]
"""(layer, its forward's arguments, gradient of the loss at its output) -> gradients by parameter. The
first axis of the first argument and of the output is the example."""

_REMEDIES: dict[type[nn.Module], str] = {
    nn.RNNBase: "take opacus.layers.DPLSTM, DPGRU or DPRNN instead",
    nn.MultiheadAttention: "write attention with nn.Linear layers for its projections, batch first",
    nn.modules.batchnorm._BatchNorm: "take nn.GroupNorm, or freeze its parameters and call eval() on it",
}


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule for a layer's own parameters; None if there is none.

    A subclass shares its parent's rule only if it has not changed what the parent computes.
    """
    for kind, rule in _RULES.items():
        if isinstance(layer, kind) and all(
            getattr(type(layer), method, None) is getattr(kind, method, None)
            for method in ("forward", "_conv_forward")
        ):
            return rule
    return _opacus_rule(layer)


def remedy_for(layer: nn.Module) -> str:
    """What to do about a layer that has no rule."""
    for kind, remedy in _REMEDIES.items():
        if isinstance(layer, kind):
            return remedy
    return (
        "put each raw parameter into a layer (nn.Linear, a convolution, nn.Embedding, a normalisation), or "
        "freeze it with requires_grad_(False)"
    )


def _linear(
    layer: nn.Linear, arguments: Sequence[Any], backprops: Tensor
) -> Mapping[nn.Parameter, PerExample]:
    inputs: Tensor = arguments[0]
    shape = (inputs.shape[0], 1, -1)
    outer = Outer(
        inputs.to(backprops.dtype).reshape(*shape, inputs.shape[-1]),
        backprops.reshape(*shape, backprops.shape[-1]),
    )
    return _weight_and_bias(layer.weight, layer.bias, outer)


def _convolution(
    layer: nn.modules.conv._ConvNd, arguments: Sequence[Any], backprops: Tensor
) -> Mapping[nn.Parameter, PerExample]:
    inputs: Tensor = arguments[0].to(backprops.dtype)
    examples, dimensions = inputs.shape[0], len(layer.kernel_size)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    for axis in range(dimensions):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        inputs = inputs.unfold(2 + axis, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    # (b, channels, *positions, *kernel) -> (b, groups, positions, channels of a group x kernel)
    patches = inputs.reshape(examples, layer.groups, -1, *inputs.shape[2:]).flatten(3, 2 + dimensions)
    patches = patches.transpose(2, 3).flatten(3)
    outer = Outer(patches, backprops.reshape(examples, layer.groups, -1, patches.shape[2]).transpose(2, 3))
    return _weight_and_bias(layer.weight, layer.bias, outer)


def _weight_and_bias(weight: Tensor, bias: Tensor | None, outer: Outer) -> dict[nn.Parameter, PerExample]:
    gradients: dict[nn.Parameter, PerExample] = {}
    if isinstance(weight, nn.Parameter):
        gradients[weight] = outer
    if isinstance(bias, nn.Parameter):
        # What is not summed is not copied.
        alone = outer.backprops.shape[2] == 1
        gradients[bias] = Dense((outer.backprops if alone else outer.backprops.sum(2)).flatten(1))
    return gradients


def _embedding(
    layer: nn.Embedding, arguments: Sequence[Any], backprops: Tensor
) -> Mapping[nn.Parameter, PerExample]:
    indices: Tensor = arguments[0]
    examples = indices.shape[0]
    flat, rows = indices.reshape(examples, -1), layer.num_embeddings
    backprops = backprops.reshape(examples, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        backprops = backprops.masked_fill((flat == layer.padding_idx)[..., None], 0.0)
    # Under a parametrization the weight is no parameter; whatever is one has no rule, and is refused.
    if not isinstance(layer.weight, nn.Parameter):
        return {}
    return {layer.weight: Lookup(flat, backprops, rows)}


def _opacus_rule(layer: nn.Module) -> Rule | None:
    """Opacus's function for this type of layer, if it is installed and has one."""
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError as error:
        raise ConfigurationError(
            f"per-example gradients of {type(layer).__name__} come from Opacus, which is not installed: "
            f"pip install 'lightning_ppdl[privacy]'"
        ) from error
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(layer))
    if sampler is None:
        return None

    trained = [p for p in layer._parameters.values() if p is not None and p.requires_grad]

    def rule(layer: nn.Module, arguments: Sequence[Any], backprops: Tensor) -> dict[nn.Parameter, PerExample]:
        # Opacus's functions pass over what does not require a gradient just now.
        before = [parameter.requires_grad for parameter in trained]
        for parameter in trained:
            parameter.requires_grad_(True)
        formed = sampler(layer, list(arguments), backprops)
        for parameter, required in zip(trained, before, strict=True):
            parameter.requires_grad_(required)
        return {parameter: Dense(values.flatten(1)) for parameter, values in formed.items()}

    return rule


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
}
