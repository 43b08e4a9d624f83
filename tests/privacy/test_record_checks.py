"""The tests of a loss, on functions small enough to know the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.record.capture import Capture
from lightning_ppdl.privacy.record.checks import Trial, check_layers, check_loss

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def network(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *more, nn.Linear(6, 3))


def check(module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], examples: int = 8) -> str:
    def on(positions: Sequence[int]) -> Tensor:
        rows = list(positions)
        return loss(module(X[rows]), Y[rows])

    capture = Capture(module)
    try:
        return check_loss(capture, Trial(module, examples, on))
    finally:
        capture.remove()


@pytest.mark.parametrize("examples", [3, 8])
def test_means_and_sums_are_told_apart(examples: int) -> None:
    assert check(network(), F.cross_entropy, examples) == "mean"
    assert check(network(), lambda z, y: F.cross_entropy(z, y, reduction="sum"), examples) == "sum"


def test_also_with_dropout_and_other_random_numbers() -> None:
    def noisy(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z + 0.1 * torch.randn_like(z) + 0.1 * random.random(), y)

    assert check(network(nn.Dropout(0.5)), F.cross_entropy) == "mean"
    assert check(network(nn.Dropout(0.5)), lambda z, y: F.cross_entropy(z, y, reduction="sum")) == "sum"
    assert check(network(), noisy) == "mean"


def test_also_where_a_pair_draws_other_dropout_than_the_batch() -> None:
    """Two layers of it: the second draws on after as many numbers as the batch has rows."""
    accepted = 0
    for seed in range(10):
        torch.manual_seed(seed)
        layers = nn.Dropout(0.5), nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)
        accepted += check(network(*layers), F.cross_entropy, len(X)) == "mean"
    assert accepted == 10


def test_a_scale_that_is_neither_is_refused() -> None:
    for power in (0.5, 2.0):
        with pytest.raises(ConfigurationError, match="neither the mean"):
            check(network(), lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(z) ** power)  # noqa: B023


def by_pairs(z: Tensor, y: Tensor) -> Tensor:
    """Couples neighbours only: what halves of a batch would not show."""
    if len(z) % 2:
        z = torch.cat([z, z[:1]])
    pairs = z.view(-1, 2, 3)
    return (pairs[:, 0] * pairs[:, 1]).mean()


def by_weight(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0]))


def by_batch(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((z - z.mean(0)) / z.std(0), y)


def by_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) ** 2


@pytest.mark.parametrize("loss", [by_pairs, by_weight, by_batch, by_loss])
def test_coupled_examples_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ConfigurationError, match="couples examples"):
        check(network(), loss)


def test_layers_that_mix_or_remember_are_named() -> None:
    check_layers(network(nn.LayerNorm(6)))
    frozen = network(nn.BatchNorm1d(6))
    with pytest.raises(ConfigurationError, match=r"2 \(BatchNorm1d\).*GroupNorm"):
        check_layers(frozen)
    check_layers(frozen.eval())
    with pytest.raises(ConfigurationError, match="BatchNorm1d"):
        check_layers(network(nn.BatchNorm1d(6, track_running_stats=False)).eval())
    with pytest.raises(ConfigurationError, match="InstanceNorm1d"):
        check_layers(nn.InstanceNorm1d(3, track_running_stats=True))
    check_layers(nn.InstanceNorm1d(3))
    for setting, value in {"max_norm": 1.0, "scale_grad_by_freq": True, "sparse": True}.items():
        with pytest.raises(ConfigurationError, match=setting):
            check_layers(nn.Embedding(3, 2, **{setting: value}))  # type: ignore[arg-type]


def test_nothing_is_disturbed() -> None:
    module = network(nn.Dropout(0.5))
    module[0].weight.grad = torch.ones(6, 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # type: ignore[index]
    check(module, F.cross_entropy)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # type: ignore[index]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(module[0].weight.grad, torch.ones(6, 4))
    assert module[0].bias.grad is None


def test_a_buffer_that_a_step_changes_is_named_and_put_back() -> None:
    class Counting(nn.Linear):
        pass

    class Remembering(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = Counting(4, 3)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            out: Tensor = self.layer(x)
            return out

    module = Remembering()
    with pytest.raises(ConfigurationError, match="changes 'seen'"):
        check(module, F.cross_entropy)
    assert module.seen.item() == 0


def test_a_parameter_that_a_forward_changes_is_named_and_put_back() -> None:
    def renormalise(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            weight.mul_(0.9)

    layer = nn.Linear(6, 6)
    weight, before = layer.weight, layer.weight.detach().clone()
    layer.register_forward_pre_hook(renormalise)
    with pytest.raises(ConfigurationError, match=r"changes '2.weight'"):
        check(network(layer), F.cross_entropy)
    assert torch.equal(weight, before)


def test_an_example_whose_gradient_is_not_finite_does_not_hide_the_others() -> None:
    def poisoned(z: Tensor, y: Tensor) -> Tensor:
        scale = torch.where(z[:, :1] > z[:, 1:2], float("nan"), 1.0)
        return F.cross_entropy(z * scale, y)

    assert check(network(), poisoned) in ("mean", "sum")
    with pytest.raises(ConfigurationError, match="couples examples"):
        check(network(), lambda z, y: by_batch(z, y) + 0 * poisoned(z, y).detach().nan_to_num())
