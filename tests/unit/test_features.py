"""Features computed once: what is loaded, and which extractors are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ppdl.data import ArrayDataset, Features, Splits
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.scattering import scattering_features


@dataclass(frozen=True)
class Noise:
    """Images of noise: `train` + `test` rows, of shape (1, 8, 8), scaled into [-1, 1]."""

    train: int = 25
    test: int = 7

    def load(self) -> Splits:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=draw)
        whole = ArrayDataset(images, torch.arange(50) % 3, scale=2 / 255, shift=-1)
        train = whole.subset(range(self.train))
        return Splits(train, whole.subset(range(50 - self.test, 50)), input_shape=(1, 8, 8), classes=3)


def inputs(part: ArrayDataset) -> Tensor:
    return part.__getitems__(range(len(part)))[0]


@pytest.mark.parametrize("batch_size", [1, 4, 25, 1000])
def test_features_are_the_extractor_s(batch_size: int) -> None:
    extractor = scattering_features(scales=1, angles=2, group=1)
    source, loaded = Noise().load(), Features(Noise(), extractor, batch_size).load()
    assert loaded.input_shape == (3 * 4 * 4,) and loaded.classes == 3
    for before, after in ((source.train, loaded.train), (source.test, loaded.test)):
        assert torch.equal(before.labels, after.labels)
        assert inputs(after).dtype == torch.float32
        torch.testing.assert_close(inputs(after), extractor(inputs(before)))


def test_a_function_will_do_and_is_called_once_an_input() -> None:
    seen = 0

    def halves(batch: Tensor) -> Tensor:
        nonlocal seen
        seen += len(batch)
        return batch[:, :, ::2].double()

    loaded = Features(Noise(), halves).load()
    assert loaded.input_shape == (1, 4, 8)
    used = seen
    inputs(loaded.train)
    assert used == seen <= 25 + 7 + 8  # a few for the checks


def test_no_feature_can_be_trained_through() -> None:
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    loaded = Features(Noise(), extractor).load()
    assert not inputs(loaded.train).requires_grad
    assert all(parameter.grad is None for parameter in extractor.parameters())


def test_a_module_is_used_in_evaluation_mode_and_left_as_it_was() -> None:
    norm, drop = nn.BatchNorm2d(1).eval(), nn.Dropout()
    extractor = nn.Sequential(norm, nn.BatchNorm2d(1), drop, nn.Flatten())
    first = inputs(Features(Noise(), extractor).load().train)
    torch.testing.assert_close(first, inputs(Features(Noise(), extractor).load().train), rtol=0, atol=0)
    assert [part.training for part in extractor] == [False, True, True, True]
    assert extractor.training
    assert extractor[1].num_batches_tracked == 0


def test_splits_without_rows() -> None:
    loaded = Features(Noise(train=1, test=0), nn.Flatten()).load()
    assert (len(loaded.train), len(loaded.test)) == (1, 0)
    assert loaded.test.input_shape == (64,)


def standardised(batch: Tensor) -> Tensor:
    return ((batch - batch.mean(0)) / batch.std(0, correction=0).clamp_min(1)).flatten(1)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (standardised, "other examples"),
        (nn.BatchNorm2d(1, track_running_stats=False), "other examples"),
        (lambda batch: nn.functional.dropout(batch, 0.5), "called again"),
        (lambda batch: batch.log(), "aren't finite for rows 0 to"),
        (lambda batch: batch.mean(), r"made \(\)"),
        (lambda batch: batch[:1], r"made \(1, 1, 8, 8\)"),
        (lambda batch: batch.numpy(), "made ndarray"),
    ],
)
def test_an_extractor_that_is_none(extractor: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Features(Noise(), extractor).load()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"features\.extractor='resnet'"):
        Features(Noise(), "resnet")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"features\.batch_size=0"):
        Features(Noise(), nn.Flatten(), batch_size=0)
