"""Per-example gradients of a module, from hooks on its layers; the module itself is not wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.record.gradients import PerExample, total_over_uses
from lightning_ppdl.privacy.record.layers import Rule, remedy_for, rule_for


class Capture:
    """Hooks that keep, in a forward, what went into each layer, and in the backward, what came back.

    Between :meth:`begin` and :meth:`end` the parameters do not require gradients: autograd then spends
    nothing on their ordinary, un-noised gradients, and ``p.grad`` never holds them.

    Args:
        module: All its trainable parameters must belong to layers with a rule
            (:mod:`lightning_ppdl.privacy.record.layers`).

    Raises:
        ConfigurationError: naming the layers without one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        if not self.parameters:
            raise ConfigurationError("the module has no trainable parameters; there is nothing to train")
        self.dtype = accumulation_dtype(self.parameters.values())
        self._order = {parameter: position for position, parameter in enumerate(self.parameters.values())}
        self._uses: dict[nn.Parameter, list[PerExample]] = {}
        self._examples: int | None = None
        self._frozen = False
        rules = _rules(module)
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(partial(self._on_forward, rule), with_kwargs=True)
            for layer, rule in rules.items()
        ]

    def begin(self, examples: int, freeze: bool = True) -> None:
        """Record the forward and backward that follow.

        Args:
            examples: b: what the first axis of every layer's input must be.
            freeze: Whether to spare autograd the ordinary gradients.
        """
        self._uses, self._examples = {}, examples
        if freeze:
            self._frozen = True
            for parameter in self._order:
                parameter.requires_grad_(False)

    def end(self) -> Mapping[int, PerExample]:
        """Stop recording.

        Returns:
            By position in ``parameters``, the gradients of those that took part, summed over all uses.
        """
        self._examples = None
        if self._frozen:
            self._frozen = False
            for parameter in self._order:
                parameter.requires_grad_(True)
        uses, self._uses = self._uses, {}
        return {
            self._order[parameter]: total_over_uses(gradients)
            for parameter, gradients in uses.items()
            if parameter in self._order
        }

    def remove(self) -> None:
        """Take the hooks off the module."""
        self.end()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_forward(
        self, rule: Rule, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._examples is None or not torch.is_grad_enabled():
            return
        arguments = [_detached(argument) for argument in (*args, *kwargs.values())]
        for what in (arguments[0], output):
            if what.ndim < 2 - (not what.is_floating_point()) or what.shape[0] != self._examples:
                raise ConfigurationError(
                    f"a {type(layer).__name__} of the module has a tensor of shape {tuple(what.shape)}, "
                    f"where the batch has {self._examples} examples: record-level privacy needs the example "
                    f"as the first axis in every layer. Keep sequences as (batch, time, features), don't "
                    f"fold other axes into the batch, and don't multiply examples in training_step"
                )
        if not output.requires_grad:
            # Nothing before this layer is trained, so autograd would pass it by. Adding this zero in
            # place (a view, or a leaf, could not take an in-place activation next) makes it look.
            output.add_(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
        versions = [argument._version for argument in arguments if isinstance(argument, Tensor)]
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(self._on_backward, rule, layer, arguments, versions)
        )

    def _on_backward(
        self, rule: Rule, layer: nn.Module, arguments: Sequence[Any], versions: list[int], backprops: Tensor
    ) -> None:
        if self._examples is None:
            return
        if versions != [argument._version for argument in arguments if isinstance(argument, Tensor)]:
            raise ConfigurationError(
                f"the input of a {type(layer).__name__} was changed in place after the layer had used it; "
                f"make that operation out of place (x = x + y instead of x += y)"
            )
        with torch.no_grad():
            for parameter, gradients in rule(layer, arguments, backprops.detach().to(self.dtype)).items():
                self._uses.setdefault(parameter, []).append(gradients)


def accumulation_dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """What norms and sums are computed in: float32, also in lower precision, or float64 if anything is."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


def _rules(module: nn.Module) -> dict[nn.Module, Rule]:
    """The rule of every layer that has trainable parameters of its own."""
    found: dict[nn.Module, Rule] = {}
    missing: list[tuple[str, nn.Module]] = []
    covered: set[nn.Parameter] = set()
    for name, layer in module.named_modules():
        if not (own := _own(layer)):
            continue
        rule = rule_for(layer)
        if rule is None:
            missing.append((name, layer))
        else:
            found[layer] = rule
            covered.update(own.values())
    # Opacus's recurrent layers show, as parameters of their own, those of the layers within.
    missing = [(name, layer) for name, layer in missing if not covered.issuperset(_own(layer).values())]
    if missing:
        raise ConfigurationError(
            "per-example gradients cannot be had for trainable parameters of"
            + "".join(
                f"\n  {name or 'the module itself'} ({type(layer).__name__}: {', '.join(_own(layer))}): "
                f"{remedy_for(layer)}"
                for name, layer in missing
            )
        )
    return found


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer._parameters.items() if p is not None and p.requires_grad}


def _detached(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument
