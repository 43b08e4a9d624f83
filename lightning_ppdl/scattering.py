"""The scattering transform: image features that nobody's data went into.

Two layers of wavelets and moduli, then a local average. The result hardly moves when the image is
shifted or bent a little, keeps what tells edges and textures apart, and nothing in it is learned.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.validation import require_count

_WIDTH = 0.8  # of the finest wavelet's envelope, in pixels
_FREQUENCY = 3 * math.pi / 4  # its central frequency, in radians a pixel
_WRAPS = 2  # how often an envelope may go round the torus


class Scattering(nn.Module):
    """Wavelet scattering of images up to the second order.

    With wavelets psi of scale j < J and L angles, and a Gaussian phi of scale J, each channel x gives

    - order 0: ``x * phi``, 1 channel;
    - order 1: ``|x * psi_j| * phi``, ``J L`` channels;
    - order 2: ``||x * psi_i| * psi_j| * phi`` with i < j, ``L^2 J (J - 1) / 2`` channels,

    sampled every 2^J pixels: 81 channels for J = 2, L = 8. The image is continued by reflection.
    Order 1 comes by scale, then angle; order 2 by i, its angle, j, its angle.

    It has no parameters and no state, and takes images of any size: a frozen feature extractor.

    Guarantee: the features of an image depend on that image alone, so that computing them is part of no
    release and costs no privacy.

    Edge cases: a zero image gives zeros; a constant one gives its value in order 0 and zero, up to
    rounding, in the others; NaN in an image spreads over that image's features only; an empty batch
    gives an empty one.

    Source: S. Mallat, "Group Invariant Scattering" (2012); J. Bruna, S. Mallat, "Invariant Scattering
    Convolution Networks" (2013); filters with the constants of M. Andreux et al., "Kymatio" (2020).

    Args:
        scales: J, at least 1.
        angles: L, at least 1.

    Raises:
        ConfigurationError: For other values; in use, for images whose sides are no multiples of 2^J, or
            as small as 2^J.
    """

    def __init__(self, scales: int = 2, angles: int = 8) -> None:
        super().__init__()
        self.scales = require_count("scales", scales)
        self.angles = require_count("angles", angles)

    @property
    def channels(self) -> int:
        """Output channels for each input channel."""
        scales, angles = self.scales, self.angles
        return 1 + scales * angles + angles**2 * scales * (scales - 1) // 2

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, channels * self.channels, height / 2^J, width / 2^J)."""
        step = 2**self.scales
        if images.ndim != 4 or any(side % step or side <= step for side in images.shape[2:]):
            raise ConfigurationError(
                f"images of shape {tuple(images.shape)}: with scales={self.scales} give (batch, channels, "
                f"height, width), where both sides are multiples of {step} and above {step}; pad or crop them"
            )
        if not len(images):
            rows, columns = (side // step for side in images.shape[2:])
            return images.new_zeros(0, images.shape[1] * self.channels, rows, columns)
        image = F.pad(images.flatten(0, 1).unsqueeze(1), (step,) * 4, mode="reflect")
        orders = [self._average(image, 0)]
        second = []
        for i in range(self.scales):
            inner = self._modulus(image, 0, i)
            orders.append(self._average(inner, i))
            second += [self._average(self._modulus(inner, i, j), j) for j in range(i + 1, self.scales)]
        if second:
            orders.append(self._interleave(second))
        features = torch.cat(orders, dim=1)
        return features.reshape(len(images), -1, *features.shape[2:])

    def _modulus(self, signal: Tensor, resolution: int, scale: int) -> Tensor:
        """``|x * psi_scale|``, (n, k * L, ...), on a grid of every ``2^scale`` pixels.

        `signal`, (n, k, ...), is x on the grid of every ``2^resolution`` pixels.
        """
        step = 2 ** (scale - resolution)
        height, width = (side // step for side in signal.shape[-2:])
        spectrum = torch.fft.fft2(signal).unsqueeze(2)
        bank = _wavelets(*signal.shape[-2:], scale - resolution, self.angles).to(spectrum)
        # Every step-th sample of a signal has the mean of the frequencies that fold together.
        folded = spectrum.new_zeros(())
        for row in range(0, step * height, height):
            for column in range(0, step * width, width):
                block = (..., slice(row, row + height), slice(column, column + width))
                folded = torch.addcmul(folded, spectrum[block], bank[block], value=1 / step**2)
        waves = torch.view_as_real(torch.fft.ifft2(folded))
        moduli: Tensor = torch.linalg.vector_norm(
            waves, dim=-1
        )  # abs() of complex numbers takes twice as long
        return moduli.flatten(1, 2)

    def _average(self, signal: Tensor, resolution: int) -> Tensor:
        """``x * phi`` on the coarsest grid, without the margin. phi is separable: two small products."""
        scale = self.scales - resolution
        rows, columns = (_low_pass(side, scale).to(signal) for side in signal.shape[-2:])
        averages: Tensor = rows @ (signal @ columns.T)
        return averages

    def _interleave(self, second: list[Tensor]) -> Tensor:
        """By i, its angle, j, its angle, from one (n, L * L, ...) for each pair i < j."""
        by_first: list[Tensor] = []
        remaining = iter(second)
        for i in range(self.scales - 1):
            pairs = [next(remaining) for _ in range(i + 1, self.scales)]
            by_angle = [pair.reshape(len(pair), self.angles, -1, *pair.shape[2:]) for pair in pairs]
            by_first.append(torch.cat(by_angle, dim=2).flatten(1, 2))
        return torch.cat(by_first, dim=1)


class ExampleNorm(nn.Module):
    """Channels of features evened out within each example, and brought to unit length.

    1. Group normalisation (Wu and He, 2018) over groups of neighbouring channels.
    2. At each position, the mean over all channels is taken away and the rest divided by
       ``sqrt(1 + variance)``: what all channels say of a place, such as that it is empty, says little
       about the class, and would be half of the vector's length.
    3. Group normalisation once more.
    4. Flattened, and divided by the L2 norm. A linear model's gradient is then bounded before it is
       clipped, and no example weighs more than another.

    Guarantee: an example's features depend on that example alone. No statistic of the data is kept,
    as batch normalisation or a standardisation would, which no privacy budget covers.

    Edge cases: what is zero, or the same in all channels, gives zeros, up to rounding; NaN stays within
    its example.

    Args:
        group: Channels in a group; must divide the number of channels.

    Raises:
        ConfigurationError: For a group that isn't a whole number of at least 1; in use, for channels
            that it does not divide.
    """

    def __init__(self, group: int = 3) -> None:
        super().__init__()
        self.group = require_count("group", group)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels * height * width)."""
        if features.ndim != 4 or features.shape[1] % self.group:
            raise ConfigurationError(
                f"group={self.group} does not divide the channels of features of shape "
                f"{tuple(features.shape)}, (batch, channels, height, width)"
            )
        channels = features.shape[1]
        evened = F.group_norm(features, channels // self.group)
        by_place = F.layer_norm(evened.movedim(1, -1), (channels,), eps=1.0).movedim(-1, 1)
        again = F.group_norm(by_place, channels // self.group)
        # An image's features have a length of about the root of their number: shorter ones are rounding.
        return F.normalize(again.flatten(1), dim=1, eps=1.0)


def scattering_features(scales: int = 2, angles: int = 8, group: int = 3) -> nn.Sequential:
    """:class:`Scattering` and :class:`ExampleNorm`: from images to flat features of unit length.

    Images of 28 x 28 have 3,969 features with the defaults.

    Source: F. Tramer, D. Boneh, "Differentially Private Learning Needs Better Features (or Much More
    Data)" (2021), with another normalisation.
    """
    return nn.Sequential(Scattering(scales, angles), ExampleNorm(group))


@lru_cache(maxsize=64)
def _wavelets(height: int, width: int, scale: int, angles: int) -> Tensor:
    """Spectra of Morlet wavelets in ``angles`` directions, real, (angles, height, width), float64."""
    spectra = []
    for index in range(angles):
        theta = (angles - angles // 2 - 1 - index) * math.pi / angles
        sigma, frequency = _WIDTH * 2**scale, _FREQUENCY / 2**scale
        wave = _gabor(height, width, sigma, theta, frequency, 4 / angles)
        envelope = _gabor(height, width, sigma, theta, 0.0, 4 / angles)
        # The envelope is taken away so that a constant gives zero.
        spectra.append(torch.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real)
    return torch.stack(spectra)


@lru_cache(maxsize=64)
def _low_pass(side: int, scale: int) -> Tensor:
    """Gaussian averages around every ``2^scale``-th point but the first and last, float64.

    Shape (side / 2^scale - 2, side): on a torus, and each row sums to 1.
    """
    step, sigma = 2**scale, _WIDTH * 2 ** (scale - 1)
    offsets = torch.arange(-_WRAPS * side, (_WRAPS + 1) * side, dtype=torch.float64)
    gaussian = torch.exp(-(offsets**2) / (2 * sigma**2)).reshape(-1, side).sum(dim=0)
    centres = torch.arange(step, side - step, step)
    averages: Tensor = (gaussian / gaussian.sum())[(torch.arange(side) - centres[:, None]) % side]
    return averages


def _gabor(height: int, width: int, sigma: float, theta: float, frequency: float, slant: float) -> Tensor:
    """A plane wave under a Gaussian envelope around (0, 0) on a torus, complex128, (height, width).

    Args:
        height, width: Of the torus.
        sigma: Deviation of the envelope along the wave; across it, ``sigma / slant``.
        theta: Direction of the wave.
        frequency: In radians a pixel.
        slant: See sigma.
    """
    rows = torch.arange(-_WRAPS * height, (_WRAPS + 1) * height, dtype=torch.float64)[:, None]
    columns = torch.arange(-_WRAPS * width, (_WRAPS + 1) * width, dtype=torch.float64)
    along = rows * math.cos(theta) + columns * math.sin(theta)
    across = columns * math.cos(theta) - rows * math.sin(theta)
    envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = torch.polar(envelope * slant / (2 * math.pi * sigma**2), frequency * along)
    return wave.reshape(2 * _WRAPS + 1, height, 2 * _WRAPS + 1, width).sum(dim=(0, 2))
