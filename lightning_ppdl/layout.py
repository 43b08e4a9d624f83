"""The shared tensors of a module as one flat float32 vector of shape (P,), and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import ParameterSpec

Share = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


class ParameterLayout:
    """Where each shared tensor lies in the flat vector; order is the module's own, and stable.

    Args:
        module: The module whose tensors are shared. Tied weights count once.
        share: Which trainable parameters are shared: None for all of them, a name pattern such as
            ``"*.lora_*"`` or a list of patterns (:mod:`fnmatch` syntax on dotted names), or a
            predicate ``(name, parameter) -> bool``. Frozen parameters are never shared.
        share_buffers: Name pattern or patterns of floating-point buffers to share as well, e.g.
            ``"*.running_*"``; None keeps every buffer local.

    Raises:
        ConfigurationError: if nothing is left to share, or a shared tensor is not materialised or
            not of a real floating-point type.
    """

    def __init__(
        self,
        module: nn.Module,
        share: Share = None,
        share_buffers: str | Sequence[str] | None = None,
    ) -> None:
        self._module = module
        self._wanted = _parameter_predicate(share)
        trainable = [name for name, p in named_parameters(module) if p.requires_grad]
        if isinstance(share, str | Sequence):
            _require_matches("share", share, trainable)
        if share_buffers is not None:
            floating = [name for name, b in named_buffers(module) if b.is_floating_point()]
            _require_matches("share_buffers", share_buffers, floating)
        self._parameter_names = self._shareable()
        self._buffer_names = [
            name
            for name, buffer in named_buffers(module)
            if share_buffers is not None and buffer.is_floating_point() and _matches(name, share_buffers)
        ]
        if not self._parameter_names + self._buffer_names:
            raise ConfigurationError(
                f"share={share!r} picks none of the module's {len(trainable)} trainable parameters; "
                f"their names are {', '.join(trainable[:5]) or '(none: every parameter is frozen)'}"
                f"{', ...' if len(trainable) > 5 else ''}"
            )
        self.specs = tuple(_spec(name, tensor) for name, tensor in self._tensors())
        self.size = sum(spec.size for spec in self.specs)
        self.exact = all(spec.dtype in ("float32", "float64") for spec in self.specs)
        """Whether :meth:`assign` keeps a float32 vector as it is; half precision rounds it."""
        offsets = [0]
        for spec in self.specs:
            offsets.append(offsets[-1] + spec.size)
        self._slices = {
            spec.name: slice(start, end) for spec, start, end in zip(self.specs, offsets, offsets[1:])
        }

    def flatten(self) -> Tensor:
        """Copy of the shared values: float32 (P,), on the module's device."""
        return torch.cat([t.detach().reshape(-1).to(torch.float32) for _, t in self._tensors()])

    def assign(self, vector: Tensor) -> None:
        """Overwrite the shared values by ``vector``, float32 (P,) on any device, in place."""
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(vector[self._slices[name]].view(tensor.shape))

    def add_gradients(self, total: Tensor, parameters: Iterable[nn.Parameter], factor: float = 1.0) -> None:
        """Add the gradients of those ``parameters`` that are shared, times ``factor``, to ``total``.

        Args:
            total: float32 (P,).
            parameters: Those that were stepped.
            factor: 1 / the loss scale where that is still on the gradients.
        """
        stepped = {id(p) for p in parameters}
        for name, tensor in self._tensors():
            if id(tensor) in stepped and tensor.grad is not None:
                gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
                total[self._slices[name]].add_(gradient.detach().reshape(-1), alpha=factor)

    def trainable_but_not_shared(self) -> list[str]:
        """Names that would be shared, had they been trainable when this layout was made."""
        known = set(self._parameter_names)
        return [name for name in self._shareable() if name not in known]

    def names_where(self, mask: Tensor) -> list[str]:
        """Names of the tensors with a true entry in ``mask``, bool (P,)."""
        return [name for name, part in self._slices.items() if bool(mask[part].any())]

    def _shareable(self) -> list[str]:
        """Names of the parameters that are trainable now and wanted."""
        return [
            name for name, p in named_parameters(self._module) if p.requires_grad and self._wanted(name, p)
        ]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        # Looked up anew each time: moving a module to another device replaces its buffers.
        parameters = dict(named_parameters(self._module))
        buffers = dict(named_buffers(self._module)) if self._buffer_names else {}
        yield from ((name, parameters[name]) for name in self._parameter_names)
        yield from ((name, buffers[name]) for name in self._buffer_names)


Patterns = TypeVar("Patterns", bound=Share)


def require_patterns(argument: str, value: Patterns) -> Patterns:
    """Return ``value`` if it is None, a name pattern, a list of them, or a predicate."""
    patterns = [value] if isinstance(value, str) else value
    if not (patterns is None or callable(patterns)) and not (
        isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise ConfigurationError(
            f"{argument}={value!r} must be a name pattern such as '*.lora_*', a list of patterns, or None"
        )
    return value


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The module's own, without what ``torch.compile`` of a submodule puts into their names."""
    for name, parameter in module.named_parameters():
        yield name.replace("_orig_mod.", ""), parameter


def named_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Likewise."""
    for name, buffer in module.named_buffers():
        yield name.replace("_orig_mod.", ""), buffer


def _parameter_predicate(share: Share) -> Callable[[str, nn.Parameter], bool]:
    if share is None:
        return lambda name, parameter: True
    if callable(share):
        return share
    patterns = share
    return lambda name, parameter: _matches(name, patterns)


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _as_list(patterns))


def _as_list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _require_matches(argument: str, patterns: str | Sequence[str], names: Sequence[str]) -> None:
    """A pattern that matches nothing is a misspelling, even if another one matches."""
    for pattern in _as_list(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(
                f"{argument}={patterns!r}: {pattern!r} matches none of {', '.join(names[:5]) or 'none'}"
                f"{', ...' if len(names) > 5 else ''}"
            )


def _spec(name: str, tensor: Tensor) -> ParameterSpec:
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        raise ConfigurationError(
            f"parameter {name!r} is not materialised yet (a lazy layer); run one batch through the "
            f"module before fit(), e.g. in configure_model()"
        )
    if not tensor.is_floating_point():
        raise ConfigurationError(
            f"parameter {name!r} has dtype {tensor.dtype}; only real floating-point parameters can be "
            f"shared. Leave it out with share=..."
        )
    return ParameterSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
