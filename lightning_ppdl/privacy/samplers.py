"""How noise gets onto numbers: fast, in floating point, or exact, on a grid with discrete noise.

What a computer adds to a float64 is never quite the noise of the theorem: the last bits of the sum depend on
both and can give the value away (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012). Rounding the sum to a public grid hides most of it; only discrete noise on discrete
data hides all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy.noise import Floats, NoiseSource

_FINE = 2.0**-20
# A grid this fine below the noise's scale keeps every sum of multiples exact in float64.
_FINEST = 2.0**-40
# Covers the rounding errors of computing a scale in float64.
_A_HAIR = 1 + 2.0**-48


def grid_below(scale: float) -> float:
    """The public grid of noise of this scale: the power of two at or just below ``scale * 2**-20``, or
    the smallest that float32 can tell from zero."""
    return 2.0 ** max(math.floor(math.log2(scale * _FINE)), -149)


def on_grid(values: Floats, scale: float) -> Floats:
    """``values`` rounded, in place, to :func:`grid_below` ``(scale)``; what is released looks like this.

    The grid depends on public settings alone, so this is post-processing. Values up to 16 times
    ``scale`` then fit a float32 exactly.
    """
    grid = grid_below(scale)
    values /= grid
    np.rint(values, out=values)
    values *= grid
    values += 0.0  # Makes -0.0, whose sign would tell on which side of zero it was, into 0.0.
    return values


class Sampler(ABC):
    """Draws the noise of a mechanism, and says on which grid its data have to lie."""

    @abstractmethod
    def grid(self, unit: float, scale: float) -> float:
        """The step between data, 0 for none; for data up to ``unit`` and noise up to ``scale``."""

    @abstractmethod
    def laplace(self, count: int, scale: float, grid: float) -> Floats:
        """float64 (count,), Laplace of this scale, multiples of ``grid``."""

    @abstractmethod
    def gaussian(self, count: int, scale: float, grid: float) -> Floats:
        """float64 (count,), Gaussian of this standard deviation, multiples of ``grid``."""

    def place(self, values: Floats, grid: float) -> Floats:
        """``values`` on the grid, rounded towards zero: what was bounded stays within its bounds, and a
        sensitivity that was derived from the bounds still holds."""
        return np.trunc(values / grid) * grid if grid else values


class FastSampler(Sampler):
    """Double precision. Open to floating-point attacks (Mironov 2012), which rounding what is
    released makes harder and does not exclude."""

    def __init__(self, noise: NoiseSource) -> None:
        self._noise = noise

    def grid(self, unit: float, scale: float) -> float:
        return 0.0

    def laplace(self, count: int, scale: float, grid: float) -> Floats:
        drawn = self._noise.laplace(count)
        drawn *= scale
        return drawn

    def gaussian(self, count: int, scale: float, grid: float) -> Floats:
        drawn = self._noise.gaussian(count)
        drawn *= scale
        return drawn


class ExactSampler(Sampler):
    """OpenDP's discrete Laplace and Gaussian, drawn in integer arithmetic from the operating system's
    coins, on data that lie on a grid: no floating-point leak. About 10 microseconds a value.

    Sums of data and noise are multiples of the grid below 2**53 of it, so float64 holds them exactly.
    Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020.

    Raises:
        ConfigurationError: if opendp is not installed.
    """

    def __init__(self) -> None:
        _opendp()

    def grid(self, unit: float, scale: float) -> float:
        return 2.0 ** math.floor(math.log2(max(unit * _FINE, scale * _FINEST)))

    def laplace(self, count: int, scale: float, grid: float) -> Floats:
        dp = _opendp()
        integers = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
        return self._drawn(dp.m.make_laplace(*integers, scale=scale / grid * _A_HAIR), count, grid)

    def gaussian(self, count: int, scale: float, grid: float) -> Floats:
        dp = _opendp()
        integers = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
        return self._drawn(dp.m.make_gaussian(*integers, scale=scale / grid * _A_HAIR), count, grid)

    def _drawn(self, measurement: Any, count: int, grid: float) -> Floats:
        integers = measurement([0] * count) if count else []
        return np.array(integers, dtype=np.float64) * grid


def make_sampler(noise: NoiseSource, exact: bool) -> Sampler:
    """The sampler for a mechanism's ``exact`` setting.

    Raises:
        ConfigurationError: if noise is to be both exact and seeded.
    """
    if not exact:
        return FastSampler(noise)
    if noise.simulated:
        raise ConfigurationError(
            "exact=True draws from the operating system's coins and cannot repeat, but the noise is seeded; "
            "use exact=False in simulations, or noise=SecretNoise()"
        )
    return ExactSampler()


def _opendp() -> Any:
    try:
        import opendp.prelude as dp
    except ImportError as error:
        raise ConfigurationError(
            "exact=True needs opendp, which is not installed: pip install 'lightning_ppdl[exact]'"
        ) from error
    dp.enable_features("contrib")
    return dp
