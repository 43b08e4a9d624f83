"""The paper's networks, their two layers that torch lacks, and the module that trains them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_ppdl.data import ArrayDataset, loader
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.models import Classifier, L2Pool, SubtractiveNorm, cnn, linear, mlp

MNIST, SVHN = (1, 32, 32), (3, 32, 32)


@pytest.mark.parametrize(
    ("factory", "shape", "classes", "parameters"),
    [
        (mlp, MNIST, 10, 140_106),
        (mlp, SVHN, 10, 402_250),
        (cnn, MNIST, 10, 105_506),
        (cnn, SVHN, 10, 313_546),
        (linear, (1, 8, 8), 10, 650),
        (linear, (30,), 2, 62),
        (functools.partial(linear, bias=False), (30,), 2, 60),
        (functools.partial(mlp, hidden=(5,)), (4,), 3, 43),
    ],
)
def test_networks(
    factory: Callable[..., nn.Module], shape: tuple[int, ...], classes: int, parameters: int
) -> None:
    network = factory(shape, classes)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert sum(value.numel() for value in network.state_dict().values()) == parameters
    assert network(torch.randn(6, *shape)).shape == (6, classes)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"\(1, 28, 28\).*\(1, 32, 32\).*model=mlp"):
        cnn((1, 28, 28), 10)
    with pytest.raises(ConfigurationError, match=r"hidden\[1\]=0"):
        mlp((4,), 2, hidden=(3, 0))
    with pytest.raises(ConfigurationError, match=r"input_shape\[0\]=-4"):
        linear((-4,), 2)
    for factory in (linear, mlp, cnn):
        with pytest.raises(ConfigurationError, match="classes=1"):
            factory(MNIST, 1)
    with pytest.raises(ConfigurationError, match="size=4 must be odd"):
        SubtractiveNorm(4)


def test_l2_pool_is_the_norm_of_each_window() -> None:
    x = torch.randn(2, 3, 5, 6)
    pooled = L2Pool(2)(x)
    assert pooled.shape == (2, 3, 2, 3)
    for row in range(2):
        for column in range(3):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(pooled[:, :, row, column], window.flatten(2).norm(dim=2))


def test_l2_pool_has_a_finite_gradient_at_zero() -> None:
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    L2Pool(2)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(0).all()


def naive_subtractive_norm(x: Tensor, size: int) -> Tensor:
    """Value by value, as the definition reads."""
    _, channels, height, width = x.shape
    result = x.clone()
    for row in range(height):
        for column in range(width):
            total, weights = torch.zeros(len(x)), 0.0
            for i in range(max(0, row - size // 2), min(height, row + size // 2 + 1)):
                for j in range(max(0, column - size // 2), min(width, column + size // 2 + 1)):
                    distance = ((i - row) ** 2 + (j - column) ** 2) / (0.25 * size) ** 2
                    weight = math.exp(-distance / 2)
                    total += weight * x[:, :, i, j].sum(dim=1)
                    weights += weight * channels
            result[:, :, row, column] -= (total / weights)[:, None]
    return result


@pytest.mark.parametrize(("size", "height", "width"), [(7, 9, 8), (7, 4, 5), (3, 5, 6), (1, 2, 2)])
def test_subtractive_norm_is_the_naive_one(size: int, height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width)
    expected = naive_subtractive_norm(x, size)
    torch.testing.assert_close(SubtractiveNorm(size)(x), expected, rtol=1e-4, atol=1e-5)


def test_subtractive_norm_of_a_constant_is_zero_up_to_the_edge() -> None:
    result = SubtractiveNorm()(torch.full((1, 2, 10, 10), 3.0))
    torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-5)


def separable(n: int = 200) -> ArrayDataset:
    """Two classes told apart by the sign of the first of four values."""
    inputs = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return ArrayDataset(inputs, (inputs[:, 0] > 0).long())


SGD = functools.partial(torch.optim.SGD, lr=0.5)


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
def test_a_plain_trainer_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = separable()
    model = Classifier(linear((4,), 2), SGD, classes=2)
    lightning = trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0)
    lightning.fit(model, loader(dataset, 10, shuffle=True), loader(dataset, 64))
    # Training logs nothing; validation logs one number.
    assert set(lightning.logged_metrics) == {"val_accuracy"}
    (tested,) = lightning.test(model, loader(dataset, 64), verbose=False)
    inputs, labels = dataset.__getitems__(range(len(dataset)))
    accuracy = float((model(inputs).argmax(1) == labels).float().mean())
    assert tested == {"test_accuracy": pytest.approx(accuracy)}
    assert accuracy > 0.95


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [MNIST, SVHN])
def test_the_paper_s_networks_train(shape: tuple[int, ...], tmp_path: Path) -> None:
    inputs = torch.randint(0, 256, (20, *shape), dtype=torch.uint8)
    dataset = ArrayDataset(inputs, torch.arange(20) % 10, scale=1 / 255)
    network = cnn(shape, 10)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    model = Classifier(network, SGD, classes=10)
    trainer(tmp_path, max_steps=2).fit(model, loader(dataset, 10))
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert parameter.isfinite().all()
        assert not parameter.equal(old)


def test_only_the_network_has_parameters_and_state() -> None:
    network = mlp((4,), 2)
    model = Classifier(network, SGD, classes=2)
    assert [id(p) for p in model.parameters()] == [id(p) for p in network.parameters()]
    assert all(name.startswith("network.") for name in model.state_dict())


def test_a_classifier_rejects_what_makes_no_optimizer() -> None:
    made = torch.optim.SGD(linear((4,), 2).parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"functools\.partial"):
        Classifier(linear((4,), 2), made, classes=2)  # type: ignore[arg-type]
