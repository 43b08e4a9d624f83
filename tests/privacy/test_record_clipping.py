"""Clipped sums against gradients taken one example at a time, and the noise that goes on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.models import cnn, mlp
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.record.capture import Capture
from lightning_ppdl.privacy.record.clipping import ClippedSum, NoisyGradient


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


Loss = Callable[[nn.Module, Any], Tensor]


def squared(module: nn.Module, inputs: Any) -> Tensor:
    """A loss that weighs every output differently, the mean over the examples."""
    out: Tensor = module(inputs).flatten(1)
    return (out - torch.linspace(-1, 1, out.shape[1])).square().sum(1).mean()


def one_by_one(module: nn.Module, inputs: Tensor, clip: float, loss: Loss = squared) -> Tensor:
    """The slow twin: the gradient of each example from a backward of its own, clipped, summed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for i in range(len(inputs)):
        taken = torch.autograd.grad(loss(module, inputs[i : i + 1]), parameters, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(parameters, taken, strict=True)
            ]
        )
        total += flat * min(1.0, clip / float(flat.norm()))
    return total


def clipped_sum(module: nn.Module, inputs: Tensor, clip: float, loss: Loss = squared) -> Tensor:
    capture = Capture(module)
    clipped = ClippedSum(list(capture.parameters.values()), clip)
    capture.begin(len(inputs))
    loss(module, inputs).backward()  # type: ignore[no-untyped-call]
    clipped.add(capture.end(), scale=len(inputs))
    capture.remove()
    return clipped.total


def require_same(module: nn.Module, inputs: Tensor, loss: Loss = squared) -> None:
    """At three clips: everything clipped, about half of it, nothing."""
    norms = [float(one_by_one(module, inputs[i : i + 1], 1e9, loss).norm()) for i in range(len(inputs))]
    for clip in (max(min(norms), 1e-3) / 3, float(np.median(norms)) + 1e-3, max(norms) * 3 + 1e-3):
        expected = one_by_one(module, inputs, clip, loss)
        actual = clipped_sum(module, inputs, clip, loss)
        assert float((actual - expected).norm()) <= 3e-4 * float(expected.norm()) + 1e-9


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Sequences(nn.Module):
    """Tokens through an embedding with padding, a normalisation and a layer over every position."""

    def __init__(self, length: int = 5, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.norm(self.embedding(tokens))))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """An embedding whose matrix is the output layer's too, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens))  # type: ignore[no-any-return]


def test_the_papers_networks() -> None:
    require_same(mlp((1, 32, 32), 10), images(6, 1, 32, 32))
    require_same(cnn((1, 32, 32), 10), images(4, 1, 32, 32))
    require_same(cnn((3, 32, 32), 10), images(3, 3, 32, 32))


@pytest.mark.parametrize("length", [2, 60])
def test_a_linear_layer_over_sequences(length: int) -> None:
    # Short sequences go through Gram matrices, long ones through the gradients themselves.
    require_same(nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)), images(4, length, 9))
    require_same(nn.Linear(9, 8, bias=False), images(4, 3, length, 9))


def test_tokens() -> None:
    tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(1))
    require_same(Sequences(), tokens)


def test_layers_left_to_opacus() -> None:
    require_same(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(36)),
        images(4, 2, 5, 5),
    )


def test_a_recurrent_layer_of_opacus() -> None:
    from opacus.layers import DPLSTM

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = DPLSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]

    require_same(Recurrent(), images(5, 6, 3))


def test_a_layer_that_is_used_twice_is_clipped_once() -> None:
    require_same(Reused(), images(5, 4))
    # Used in the batch with sequences of different lengths, its uses still make one gradient.
    require_same(Tied(), torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(2)))


def test_only_what_is_trained_counts() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    module[0].requires_grad_(False)
    require_same(module, images(5, 4))
    module[2].bias.requires_grad_(False)
    require_same(module, images(5, 4))


def test_a_layer_that_takes_no_part() -> None:
    module = Reused()
    module.unused = nn.Linear(2, 2)
    require_same(module, images(3, 4))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    torch.manual_seed(0)
    dimensions = data.draw(st.integers(1, 3))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    groups = data.draw(st.sampled_from([1, 2, 3]))
    small = st.integers(1, 2)
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dimensions)]
    stride = [data.draw(small) for _ in range(dimensions)]
    dilation = [data.draw(small) for _ in range(dimensions)]
    padding: Any = data.draw(st.sampled_from(["valid", "same", [1] * dimensions, [0] * dimensions]))
    if padding == "same":
        stride = [1] * dimensions
    mode = data.draw(st.sampled_from(["zeros", "circular", "reflect"]))
    if dimensions == 3 and mode == "reflect":
        mode = "replicate"
    layer = kind(
        groups * data.draw(small),
        groups * data.draw(small),
        tuple(kernel),
        stride=tuple(stride),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=mode,
    )
    sides = [data.draw(st.integers(5, 7)) for _ in range(dimensions)]
    require_same(layer, images(3, layer.in_channels, *sides))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=2),
    st.integers(1, 6),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_stack_of_linear_layers(axes: list[int], examples: int, widths: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width, after in zip([4, *widths], widths, strict=False):
        layers += [nn.Linear(width, after, bias=bias), nn.Tanh()]
    require_same(nn.Sequential(*layers), images(examples, *axes, 4))


def test_micro_batches_add_up() -> None:
    module, inputs = mlp((4,), 3, hidden=(5,)), images(7, 4)
    capture = Capture(module)
    clipped = ClippedSum(list(capture.parameters.values()), 0.2)
    for part in (inputs[:2], inputs[2:3], inputs[3:]):
        capture.begin(len(part))
        squared(module, part).backward()  # type: ignore[no-untyped-call]
        clipped.add(capture.end(), scale=len(part))
    capture.remove()
    torch.testing.assert_close(clipped.total, one_by_one(module, inputs, 0.2), rtol=1e-4, atol=1e-6)
    clipped.reset()
    assert not clipped.total.any()


@pytest.mark.parametrize("record", [1.0, 1e3, 1e30, float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("build", [lambda: mlp((4,), 3), lambda: nn.Linear(4, 2)])
def test_one_record_moves_the_sum_by_at_most_the_clip(record: float, build: Callable[[], nn.Module]) -> None:
    module, clip = build(), 0.05
    inputs = torch.cat([images(5, 4), record * images(6, 4)[5:]])
    before, after = clipped_sum(module, inputs[:5], clip), clipped_sum(module, inputs, clip)
    moved = float((after - before).norm())
    assert moved <= clip * (1 + 1e-5)
    if record == 1e3:  # the control: it does count
        assert moved > 0.99 * clip


def test_a_gradient_that_is_not_finite_counts_nothing() -> None:
    module, inputs = mlp((4,), 3), images(6, 4)
    inputs[2, 1] = float("nan")
    expected = clipped_sum(module, inputs[[0, 1, 3, 4, 5]], 0.5)
    torch.testing.assert_close(clipped_sum(module, inputs, 0.5), expected, rtol=1e-4, atol=1e-6)
    tokens = torch.tensor([[1, 2], [3, 3]])
    embedding = nn.Embedding(4, 2)

    def poisoned(module: nn.Module, tokens: Tensor) -> Tensor:
        out: Tensor = module(tokens)
        return (out * torch.tensor([1.0, float("nan")])[:, None, None]).mean()

    total = clipped_sum(embedding, tokens, 0.5, poisoned).view(4, 2)
    assert total[1:3].abs().sum() > 0
    assert total.isfinite().all()
    assert not total[3].any()


def test_ordinary_gradients_are_never_formed_and_the_module_stays_as_it_was() -> None:
    module = mlp((4,), 3)
    names, types = list(module.state_dict()), [type(layer) for layer in module.modules()]
    clipped_sum(module, images(3, 4), 1.0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert list(module.state_dict()) == names
    assert [type(layer) for layer in module.modules()] == types
    assert not any(layer._forward_hooks for layer in module.modules())


def test_refused_layers_are_named_with_their_remedy() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ConfigurationError, match=r"1 \(LSTM: weight_ih_l0.*DPLSTM"):
        Capture(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))
    with pytest.raises(ConfigurationError, match=r"Scaled: scale\).*raw parameter into a layer"):
        Capture(Scaled())
    with pytest.raises(ConfigurationError, match=r"GroupNorm"):
        Capture(nn.BatchNorm1d(3))
    with pytest.raises(ConfigurationError, match="no trainable parameters"):
        Capture(nn.ReLU())


def test_a_changed_forward_has_no_closed_form() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ConfigurationError, match="Doubled"):
        Capture(Doubled(2, 2))


def test_folded_axes_and_changed_inputs_are_refused() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]

    with pytest.raises(ConfigurationError, match="first axis"):
        clipped_sum(Folded(), images(3, 5, 4), 1.0)

    class Changed(Folded):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y = self.layer(x)
            x += 1
            return y * x[:, :2]  # type: ignore[no-any-return]

    with pytest.raises(ConfigurationError, match="in place"):
        clipped_sum(Changed(), images(3, 4), 1.0)


def noised(deviation: float, draws: int, factor: float = 1.0, seed: int = 0) -> np.ndarray[Any, Any]:
    """What is left in ``grad`` of noise, over ``draws`` steps of a sum of 0.5 in every entry."""
    layer = nn.Linear(50, 20)
    parameters = list(layer.parameters())
    clipped = ClippedSum(parameters, 1.0)
    clipped.total.fill_(0.5)
    noise = SeededNoise(seed, simulated=True)
    gradient = NoisyGradient(parameters, deviation * factor, 40.0, lambda: noise.gaussian(1020))
    taken = []
    for _ in range(draws):
        gradient.write(clipped)
        taken.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).numpy())
    return np.concatenate(taken) * 40.0 - 0.5


def test_the_noise_has_the_right_scale_and_a_scale_5_percent_off_is_seen() -> None:
    def p_value(values: np.ndarray[Any, Any]) -> float:
        return float(stats.kstest(values / 3.0, "norm").pvalue)

    assert p_value(noised(3.0, 40)) > 1e-3
    assert p_value(noised(3.0, 40, factor=1.05)) < 1e-6
    assert p_value(noised(3.0, 40, factor=0.95)) < 1e-6


def test_the_noised_sum_lies_on_a_public_grid() -> None:
    steps = (noised(3.0, 1) + 0.5) / 3.0 * 2**20
    # float32 after the division by 40 keeps 24 bits, so the grid shows in the entries that are small.
    small = steps[np.abs(steps) < 2**18]
    assert len(small) > 50
    np.testing.assert_allclose(small, np.round(small), atol=0.1)


def test_double_precision_and_lower_precision() -> None:
    module = mlp((4,), 3).double()
    torch.testing.assert_close(
        clipped_sum(module, images(5, 4).double(), 0.3).float(),
        clipped_sum(module.float(), images(5, 4), 0.3),
        rtol=1e-4,
        atol=1e-6,
    )
    half = mlp((4,), 3).bfloat16()
    total = clipped_sum(half, images(5, 4).bfloat16(), 0.3)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, clipped_sum(half.float(), images(5, 4), 0.3), rtol=0.1, atol=0.02)


def test_autocast() -> None:
    module = mlp((4,), 3)
    with torch.autocast("cpu", torch.bfloat16):
        total = clipped_sum(module, images(5, 4), 0.3)
    torch.testing.assert_close(total, clipped_sum(module, images(5, 4), 0.3), rtol=0.1, atol=0.02)
