"""What would void the guarantee of private steps, found before the first of them.

The sensitivity of a clipped sum rests on every example's gradient depending on that example alone. That is
tested on real examples: a gradient that changes when only *other* examples are exchanged is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.record.capture import Capture
from lightning_ppdl.privacy.record.gradients import PerExample

Reduction = Literal["mean", "sum"]

EXAMPLES = 24
"""How many examples the tests of a loss take, if there are as many: a rare kind is seldom among them."""
_ALONE = 2


@dataclass(frozen=True)
class Trial:
    """How to run a training step on examples of one's choice.

    Args:
        module: What is trained.
        examples: How many different ones there are to choose from, 3 or more.
        loss: From positions in [0, examples) to the loss that a training step has on those, in that order.
        tolerance: Relative; above what arithmetic of the step's precision does.
    """

    module: nn.Module
    examples: int
    loss: Callable[[Sequence[int]], Tensor]
    tolerance: float = 1e-3


def check_layers(module: nn.Module) -> None:
    """Refuse layers that mix the examples of a batch, or remember them.

    Raises:
        ConfigurationError: naming the layers, with the remedy.
    """
    for name, layer in module.named_modules():
        kind = f"{name} ({type(layer).__name__})"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (
            layer.training or layer.running_mean is None
        ):
            raise ConfigurationError(
                f"{kind} normalises each example by the others of its batch, so no example's gradient is its "
                f"own; take nn.GroupNorm or nn.LayerNorm, or keep it in eval() with public statistics"
            )
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and (
            layer.training and layer.track_running_stats
        ):
            raise ConfigurationError(
                f"{kind} keeps running statistics of the data in buffers, without noise; give "
                f"track_running_stats=False"
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(layer, setting):
                    raise ConfigurationError(
                        f"{kind} has {setting}={getattr(layer, setting)!r}, which acts on rows by which "
                        f"tokens the batch holds, without noise; leave it out"
                    )


def check_loss(capture: Capture, trial: Trial) -> Reduction:
    """Run a few training steps, without taking them, and refuse what makes gradients not private.

    Module, parameters, gradients, buffers and random generators are left as they were.

    A test and no proof: it sees ``trial.examples`` examples, now. It does not see a loss that couples only
    from a later step on, or only for kinds of examples that are not among them: a mean over what remains
    without ``ignore_index`` is a mean over the batch as long as no label is ignored.

    Returns:
        Whether the loss is the mean or the sum over the batch.

    Raises:
        ConfigurationError: if a step changes buffers or parameters by itself, if a parameter's gradient
            is not the sum of what its layers saw, if examples are coupled, or if the loss is neither mean
            nor sum.
    """
    if trial.examples < 3:
        raise ConfigurationError(
            f"the train data set has {trial.examples} records; privacy of records needs at least 3, and "
            f"thousands to be of use"
        )
    with _undisturbed(trial.module) as require_constant:
        everyone = list(range(trial.examples))
        gradients = _gradients(capture, trial, everyone, compare=True)
        require_constant()
        for position in everyone:
            stranger = (position + trial.examples // 2) % trial.examples
            others = [i if i == position else stranger for i in everyone]
            _require_unchanged(
                _only(capture, gradients, position, trial.examples),
                _only(capture, _gradients(capture, trial, others), position, trial.examples),
                trial.tolerance,
            )
        random = not _deterministic(trial)
        pairs = [everyone[first : first + _ALONE] for first in range(0, trial.examples - 1, _ALONE)]
        ratio = _shrinkage(capture, trial, gradients, pairs[:1])
        reduction = _nearest(ratio, trial, 0.4 if random else trial.tolerance)
        if reduction is None and random:
            # The first pair often draws the same dropout as among all, but not in every network: there one
            # pair tells little, and all of them enough.
            ratio = _shrinkage(capture, trial, gradients, pairs)
            reduction = _nearest(ratio, trial, 0.4)
        if reduction is None:
            raise ConfigurationError(
                f"in a batch of {trial.examples} an example's gradient is {ratio:.3g} times that in a batch "
                f"of {_ALONE}: the loss is neither the mean ({_ALONE / trial.examples:.3g}) nor the sum (1) "
                f"over the examples of the batch; make it one"
            )
        return reduction


def _gradients(
    capture: Capture, trial: Trial, positions: Sequence[int], compare: bool = False
) -> Mapping[int, PerExample]:
    """The per-example gradients of one step, unscaled, with the same random numbers as every other one."""
    with _same_randomness():
        capture.begin(len(positions), freeze=not compare)
        try:
            loss = trial.loss(positions)
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            gradients = capture.end()
    if compare:
        _require_captured(capture, gradients, len(positions), trial.tolerance)
        for parameter in capture.parameters.values():
            parameter.grad = None
    return gradients


def _require_captured(
    capture: Capture, gradients: Mapping[int, PerExample], examples: int, tolerance: float
) -> None:
    """Refuse parameters whose gradient is more than what their layers captured."""
    ordinary = {name: p.grad for name, p in capture.parameters.items() if p.grad is not None}
    largest = max((float(grad.norm()) for grad in ordinary.values()), default=0.0)
    for position, (name, parameter) in enumerate(capture.parameters.items()):
        expected = ordinary.get(name, torch.zeros_like(parameter)).flatten().to(capture.dtype)
        captured = torch.zeros_like(expected)
        if position in gradients:
            weights = torch.ones(examples, dtype=capture.dtype, device=expected.device)
            gradients[position].add_weighted_sum(captured, weights)
        if float((captured - expected).norm()) > tolerance * float(expected.norm()) + 1e-5 * largest:
            raise ConfigurationError(
                f"{name}: its gradient is not the sum of what its layer saw, so it is used outside that "
                f"layer: as a raw tensor (call the layer instead), or as a penalty in the loss (give the "
                f"optimizer a weight_decay instead)"
            )


def _only(capture: Capture, gradients: Mapping[int, PerExample], position: int, examples: int) -> Tensor:
    """The whole gradient of one example, (P,)."""
    parts = []
    for index, parameter in enumerate(capture.parameters.values()):
        part = torch.zeros(parameter.numel(), dtype=capture.dtype, device=parameter.device)
        if index in gradients:
            weights = torch.zeros(examples, dtype=part.dtype, device=part.device)
            weights[position] = 1.0
            gradients[index].add_weighted_sum(part, weights)
        parts.append(part)
    return torch.cat(parts)


def _require_unchanged(before: Tensor, after: Tensor, tolerance: float) -> None:
    if not bool(before.isfinite().all()):  # Such an example is left out of every step.
        return
    if float((after - before).norm()) > tolerance * float(before.norm()):
        raise ConfigurationError(
            "an example's gradient changed when only the other examples of its batch were exchanged: the "
            "loss or the network couples examples (a contrastive loss, mixup, statistics or weights over the "
            "batch, a mean over tokens of all examples), so clipping bounds nobody's influence. Make the "
            "loss the mean or the sum of losses of single examples. (Only a few records were tried: look "
            "yourself for what couples others, such as those with rare labels)"
        )


def _shrinkage(
    capture: Capture, trial: Trial, among: Mapping[int, PerExample], pairs: Sequence[Sequence[int]]
) -> float:
    """How large examples' gradients are among all, of what they are in batches of two; 1 if all are zero."""
    larger = smaller = 0.0
    for pair in pairs:
        alone = _gradients(capture, trial, pair)
        for place, position in enumerate(pair):
            norms = (
                float(_only(capture, among, position, trial.examples).norm()),
                float(_only(capture, alone, place, _ALONE).norm()),
            )
            if np.isfinite(norms).all():
                larger, smaller = larger + norms[0], smaller + norms[1]
    return larger / smaller if smaller > 0 else 1.0


def _nearest(ratio: float, trial: Trial, tolerance: float) -> Reduction | None:
    """A mean or a sum, whichever shrinks so; None if neither does."""
    expected: dict[Reduction, float] = {"mean": _ALONE / trial.examples, "sum": 1.0}
    nearest = min(expected, key=lambda reduction: abs(np.log(max(ratio, 1e-9) / expected[reduction])))
    return nearest if abs(ratio - expected[nearest]) <= tolerance * expected[nearest] else None


def _deterministic(trial: Trial) -> bool:
    with _same_randomness():
        before = _states()
        with torch.no_grad():
            trial.loss(range(_ALONE))
        after = _states()
    return all(_equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Put gradients, parameters and buffers back.

    Yields:
        Refuses what changed parameters or buffers until then.
    """

    def state() -> dict[str, Tensor]:
        return {**dict(module.named_buffers()), **dict(module.named_parameters())}

    def require_constant() -> None:
        for name, value in state().items():
            if name in kept and not _equal(value, kept[name]):
                raise ConfigurationError(
                    f"a training step changes {name!r} by itself: what data leave there carries no noise; "
                    f"keep it constant in training"
                )

    kept = {name: value.detach().clone() for name, value in state().items()}
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield require_constant
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for name, value in state().items():
                if name in kept and value.shape == kept[name].shape:
                    value.copy_(kept[name])


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Run from fixed random states, and put the generators back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _states() -> list[Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy: Any = np.random.get_state()
    return [torch.get_rng_state(), np.array(random.getstate()[1]), numpy[1], numpy[2], *cuda]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(torch.all((a == b) | ((a != a) & (b != b))))
    return bool(np.all(a == b))
