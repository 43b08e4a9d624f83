"""The networks of the paper's evaluation and the LightningModule that trains them.

Every factory takes the shape of one input and the number of classes, and returns a module from
(batch, *input_shape) to logits (batch, classes). Weights are drawn from torch's global generator:
participants that start alike are seeded alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.validation import require_count

#: Makes the optimizer of the parameters it is given, such as ``partial(torch.optim.SGD, lr=0.1)``.
OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]


def linear(input_shape: Sequence[int], classes: int, bias: bool = True) -> nn.Sequential:
    """Logistic regression: for convex experiments, and as the head on frozen features.

    Args:
        input_shape: Of one input; flattened.
        classes: Number of logits.
        bias: Whether each logit has a bias. On features of unit length a bias takes half of each
            example's clipped gradient (squared norm), and is best left out.

    Raises:
        ConfigurationError: If a size is not a whole number of at least 1, or classes is below 2.
    """
    _require_sizes("input_shape", input_shape)
    _require_classes(classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes, bias=bias))


def mlp(input_shape: Sequence[int], classes: int, hidden: Sequence[int] = (128, 64)) -> nn.Sequential:
    """The paper's multi-layer perceptron with ReLU: 140,106 parameters on MNIST, 402,250 on SVHN.

    Args:
        input_shape: Of one input; flattened.
        classes: Number of logits.
        hidden: Units of each hidden layer; the default is the paper's.

    Raises:
        ConfigurationError: If a size is not a whole number of at least 1, or classes is below 2.
    """
    _require_sizes("input_shape", input_shape)
    _require_sizes("hidden", hidden)
    _require_classes(classes)
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn(input_shape: Sequence[int], classes: int) -> nn.Sequential:
    """The paper's convolutional network for this shape of input.

    (1, 32, 32) gives the one for MNIST, 105,506 parameters with 10 classes; (3, 32, 32) gives the
    one for SVHN, 313,546.

    Raises:
        ConfigurationError: For any other shape, or fewer than 2 classes.
    """
    _require_classes(classes)
    shape = tuple(input_shape)
    if shape == (1, 32, 32):
        return _mnist_cnn(classes)
    if shape == (3, 32, 32):
        return _svhn_cnn(classes)
    raise ConfigurationError(
        f"input_shape={shape}: the paper has convolutional networks for (1, 32, 32) and "
        "(3, 32, 32) only; take model=mlp"
    )


def _mnist_cnn(classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.Tanh(), nn.MaxPool2d(3)),  # 32 x 9 x 9
        *(nn.Conv2d(32, 64, 5), nn.Tanh(), nn.MaxPool2d(2)),  # 64 x 2 x 2
        *(nn.Flatten(), nn.Linear(256, 200), nn.Tanh(), nn.Linear(200, classes)),
    )


def _svhn_cnn(classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.Tanh(), L2Pool(2), SubtractiveNorm()),  # 64 x 14 x 14
        *(nn.Conv2d(64, 64, 5), nn.Tanh(), L2Pool(2), SubtractiveNorm()),  # 64 x 5 x 5
        *(nn.Flatten(), nn.Linear(1600, 128), nn.Tanh(), nn.Linear(128, classes)),
    )


class L2Pool(nn.Module):
    """The root of the sum of squares over windows that don't overlap (Torch7's SpatialLPPooling).

    torch's ``lp_pool2d`` has a NaN gradient where a window is all zero; here that gradient is 0,
    and the output there is 1e-6.

    Args:
        size: The window's side; also the stride.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        require_count("size", size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels, height // size, width // size)."""
        squares = F.avg_pool2d(x.square(), self.size) * self.size**2
        return squares.clamp_min(1e-12).sqrt()


class SubtractiveNorm(nn.Module):
    """Subtract from every value the weighted mean of its neighbourhood, over all channels.

    Weights are a Gaussian of deviation size / 4; beyond the edge there is nothing, and the weights
    inside are scaled up to sum to 1. Nothing is learned.

    Source: Torch7's SpatialSubtractiveNormalization with ``image.gaussian1D(7)``, as in P.
    Sermanet, S. Chintala, Y. LeCun, "Convolutional Neural Networks Applied to House Numbers Digit
    Classification", ICPR 2012.

    Args:
        size: The neighbourhood's side, odd.
    """

    kernel: Tensor

    def __init__(self, size: int = 7) -> None:
        super().__init__()
        require_count("size", size)
        if size % 2 == 0:
            raise ConfigurationError(f"size={size} must be odd, so that a neighbourhood has a middle")
        offsets = torch.arange(size) - size // 2
        bell = torch.exp(-0.5 * (offsets / (0.25 * size)) ** 2)
        kernel = torch.outer(bell, bell)
        # Not persistent: it is a constant, and no participant's state.
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same shape."""
        margin = self.kernel.shape[-1] // 2
        mean = F.conv2d(x.mean(dim=1, keepdim=True), self.kernel, padding=margin)
        inside = F.conv2d(x.new_ones(1, 1, *x.shape[2:]), self.kernel, padding=margin)
        return x - mean / inside


class Classifier(pl.LightningModule):
    """Cross entropy on a network's logits; logs ``val_accuracy`` and ``test_accuracy``, in [0, 1].

    A training step logs nothing: where a step takes 0.4 ms, logging would be a good part of it.

    Args:
        network: From (batch, *input_shape) to logits (batch, classes).
        optimizer: Makes the optimizer of the parameters.
        classes: Number of classes.

    Raises:
        ConfigurationError: If `optimizer` can't be called, or there are fewer than 2 classes.
    """

    def __init__(self, network: nn.Module, optimizer: OptimizerFactory, classes: int) -> None:
        super().__init__()
        _require_classes(classes)
        if not callable(optimizer):
            raise ConfigurationError(
                f"optimizer={optimizer!r} must be a function of the parameters, such as "
                "functools.partial(torch.optim.SGD, lr=0.1)"
            )
        self.network = network
        self.make_optimizer = optimizer
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of the batch, ()."""
        inputs, labels = batch
        return F.cross_entropy(self.network(inputs), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the batch towards the epoch's ``val_accuracy``."""
        self._count(self.val_accuracy, "val_accuracy", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the batch towards the epoch's ``test_accuracy``."""
        self._count(self.test_accuracy, "test_accuracy", batch)

    def _count(self, metric: MulticlassAccuracy, name: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        metric.update(self.network(inputs), labels)
        self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of all parameters."""
        return self.make_optimizer(self.parameters())


def _require_sizes(name: str, sizes: Sequence[int]) -> None:
    for position, size in enumerate(sizes):
        require_count(f"{name}[{position}]", size)


def _require_classes(classes: int) -> None:
    if require_count("classes", classes) < 2:
        raise ConfigurationError(f"classes={classes} must be a whole number, 2 or more")
