"""Where noise and secret coins come from: a cipher keyed by the operating system, or, in simulations
only, a seed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class NoiseSource(ABC):
    """Random numbers for noise and for sampling that must stay secret. Thread-safe."""

    simulated: bool
    """Whether whoever knows a seed can know the noise; then there is no privacy."""

    @abstractmethod
    def uniform(self, count: int) -> Floats:
        """float64 (count,), uniform in [0, 1)."""

    @abstractmethod
    def gaussian(self, count: int) -> Floats:
        """float64 (count,), standard normal."""

    @abstractmethod
    def laplace(self, count: int) -> Floats:
        """float64 (count,), Laplace of scale 1."""
