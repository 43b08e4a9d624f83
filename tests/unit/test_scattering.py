"""The scattering transform against a slow twin, and the properties it is used for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.scattering import ExampleNorm, Scattering, scattering_features


def smooth_images(n: int, side: int, width: float = 2.0) -> Tensor:
    """Random blobs that end before the border, (n, 1, side, side)."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.arange(side, dtype=torch.float32)
    images = torch.zeros(n, side, side)
    for _ in range(6):
        row, column = (side * (0.35 + 0.3 * torch.rand(2, n, 1, generator=draw))).unbind(0)
        blob = torch.exp(-((grid - row) ** 2)[:, :, None] / (2 * width**2)) * torch.exp(
            -((grid - column) ** 2)[:, None, :] / (2 * width**2)
        )
        images += torch.randn(n, 1, 1, generator=draw) * blob
    return images[:, None]


# --- The slow twin: as the definition reads, point by point, on the whole plane --------------------


def table(reach: int, sigma: float, theta: float, frequency: float, slant: float) -> np.ndarray[Any, Any]:
    """The Gabor filter at offsets up to ``reach``."""
    u, v = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along, across = u * math.cos(theta) + v * math.sin(theta), v * math.cos(theta) - u * math.sin(theta)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    values: np.ndarray[Any, Any] = (
        envelope * slant / (2 * math.pi * sigma**2) * np.exp(1j * frequency * along)
    )
    return values


def morlet(reach: int, scale: int, angle: int, angles: int) -> np.ndarray[Any, Any]:
    shape = (0.8 * 2**scale, (angles - angles // 2 - 1 - angle) * math.pi / angles)
    wave = table(reach, *shape, 0.75 * math.pi / 2**scale, 4 / angles)
    envelope = table(reach, *shape, 0.0, 4 / angles)
    filtered: np.ndarray[Any, Any] = wave - wave.sum() / envelope.sum() * envelope
    return filtered


def convolve(signal: np.ndarray[Any, Any], kernel: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    """Around every ``step``-th point, on a torus, by summing up."""
    reach = len(kernel) // 2
    result = np.zeros(signal.shape, dtype=complex)
    for row, column in np.argwhere(abs(kernel) > 1e-13):
        result += kernel[row, column] * np.roll(signal, (row - reach, column - reach), axis=(0, 1))
    return result[::step, ::step]


def slow_scattering(image: np.ndarray[Any, Any], scales: int, angles: int) -> np.ndarray[Any, Any]:
    margin = 2**scales
    padded = np.pad(image, margin, mode="reflect")

    def average(signal: np.ndarray[Any, Any], scale: int) -> np.ndarray[Any, Any]:
        blur = table(30, 0.8 * 2 ** (scales - scale - 1), 0.0, 0.0, 1.0).real
        return convolve(signal, blur / blur.sum(), 2 ** (scales - scale)).real[1:-1, 1:-1]

    orders: list[list[np.ndarray[Any, Any]]] = [[average(padded, 0)], [], []]
    for i in range(scales):
        for first in range(angles):
            inner = abs(convolve(padded, morlet(30, i, first, angles), 2**i))
            orders[1].append(average(inner, i))
            for j in range(i + 1, scales):
                for second in range(angles):
                    outer = abs(convolve(inner, morlet(30, j - i, second, angles), 2 ** (j - i)))
                    orders[2].append(average(outer, j))
    return np.stack([channel for order in orders for channel in order])


@pytest.mark.parametrize(("scales", "angles", "shape"), [(2, 5, (8, 12)), (3, 2, (16, 24)), (1, 8, (6, 4))])
def test_it_is_what_the_definition_says(scales: int, angles: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).standard_normal(shape)
    expected = slow_scattering(image, scales, angles)
    result = Scattering(scales, angles)(torch.from_numpy(image)[None, None])[0].numpy()
    np.testing.assert_allclose(result, expected, atol=1e-10)


# --- Shape and convention --------------------------------------------------------------------------


def test_the_shape_for_mnist() -> None:
    assert Scattering().channels == 81
    assert Scattering()(torch.rand(3, 1, 28, 28)).shape == (3, 81, 7, 7)
    assert scattering_features()(torch.rand(3, 1, 28, 28)).shape == (3, 3969)


def test_every_channel_by_itself_and_no_example_sees_another() -> None:
    images = torch.rand(2, 3, 8, 12)
    together = Scattering()(images)
    assert together.shape == (2, 243, 2, 3)
    alone = torch.cat([Scattering()(images[1:, channel : channel + 1]) for channel in range(3)], dim=1)
    torch.testing.assert_close(together[1:], alone)
    assert Scattering()(images[:0]).shape == (0, 243, 2, 3)


def test_it_has_nothing_to_train_or_to_store() -> None:
    assert list(scattering_features().state_dict()) == []


def test_a_wave_is_found_in_its_own_channel() -> None:
    """Channel 1 + L j + angle answers most to a wave of that scale and direction."""
    scattering = Scattering(2, 8)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for scale in range(2):
        for angle in range(8):
            theta = (3 - angle) * math.pi / 8
            phase = 0.75 * math.pi / 2**scale * (rows * math.cos(theta) + columns * math.sin(theta))
            response = scattering(phase.cos()[None, None])[0, 1:17, 2:-2, 2:-2].mean(dim=(1, 2))
            assert int(response.argmax()) == 8 * scale + angle


# --- Properties ------------------------------------------------------------------------------------


def test_a_constant_is_all_in_order_zero() -> None:
    features = Scattering()(torch.full((1, 1, 16, 16), 0.5, dtype=torch.float64))[0]
    torch.testing.assert_close(features[0], torch.full((4, 4), 0.5, dtype=torch.float64))
    assert features[1:].abs().max() < 1e-12
    assert Scattering()(torch.zeros(1, 1, 8, 8)).eq(0).all()


def test_it_is_linear_in_contrast_and_blind_to_sign_above_order_zero() -> None:
    image = smooth_images(1, 16)
    features = Scattering()(image)
    torch.testing.assert_close(Scattering()(3 * image), 3 * features)
    torch.testing.assert_close(Scattering()(-image)[:, 1:], features[:, 1:])


def test_it_contracts_up_to_a_little() -> None:
    """Distances do not grow, and most of an image's energy is kept (Mallat, 2012, section 2)."""
    images = smooth_images(40, 32)
    area = 4**2  # pixels that a feature stands for
    features = Scattering()(images).flatten(1)
    energy = area * features.square().sum(1) / images.flatten(1).square().sum(1)
    assert energy.min() > 0.5 and energy.max() < 1.05
    pairs = torch.combinations(torch.arange(40))
    distances = [
        (x[pairs[:, 0]] - x[pairs[:, 1]]).norm(dim=1) for x in (images.flatten(1), math.sqrt(area) * features)
    ]
    assert (distances[1] <= 1.05 * distances[0]).all()


def test_a_shift_moves_features_less_than_pixels() -> None:
    images = smooth_images(20, 32, width=1.0)
    moved = images.roll(1, dims=-1)  # nothing is near the border
    change = [
        float((view(moved) - view(images)).norm() / view(images).norm())
        for view in (torch.nn.Identity(), Scattering(2), Scattering(3))
    ]
    assert change[2] < change[1] < change[0] / 2


def test_translation_by_the_sampling_step_is_a_translation() -> None:
    images = smooth_images(4, 64, width=1.0)
    features, moved = Scattering()(images), Scattering()(images.roll(4, dims=-2))
    torch.testing.assert_close(moved, features.roll(1, dims=-2), atol=1e-5, rtol=1e-4)


def test_single_and_double_precision_agree() -> None:
    images = smooth_images(2, 16)
    torch.testing.assert_close(Scattering()(images), Scattering()(images.double()).float())


def test_nan_stays_in_its_example() -> None:
    images = torch.rand(3, 1, 8, 8)
    clean = scattering_features()(images)
    images[1, 0, 3, 3] = math.nan
    spoilt = scattering_features()(images)
    torch.testing.assert_close(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1].isnan().any()


# --- ExampleNorm -----------------------------------------------------------------------------------


def test_features_have_length_one_whatever_the_contrast() -> None:
    images = smooth_images(5, 16)
    features = scattering_features()(torch.cat([images, 1e3 * images, torch.zeros(1, 1, 16, 16)]))
    torch.testing.assert_close(features[:-1].norm(dim=1), torch.ones(10))
    assert features[-1].eq(0).all()


def test_groups_are_centred_and_what_all_channels_share_is_gone() -> None:
    features = torch.rand(4, 6, 3, 3)
    groups = ExampleNorm(2)(features).reshape(4, 3, -1)
    torch.testing.assert_close(groups.mean(dim=2), torch.zeros(4, 3), atol=1e-6, rtol=0)
    shared = torch.randn(4, 1, 3, 3).expand(4, 6, 3, 3)
    assert ExampleNorm(2)(shared).abs().max() < 1e-2


# --- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 1, 27, 28), (2, 1, 28, 30), (2, 1, 4, 8)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="multiples of 4 and above 4"):
        Scattering()(torch.zeros(shape))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigurationError, match="scales=0"):
        Scattering(scales=0)
    with pytest.raises(ConfigurationError, match=r"angles=2\.5"):
        Scattering(angles=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="group=0"):
        ExampleNorm(0)
    with pytest.raises(ConfigurationError, match="group=4"):
        ExampleNorm(4)(torch.zeros(1, 81, 7, 7))
