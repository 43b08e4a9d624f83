"""The sparse vector mechanism once more, as PAPER and Lyu, Su and Li write it: slow, entry by entry, for many
runs side by side, with draws from outside and with faults to order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """Standard Laplace: queries (n, P), thresholds (n, c), values (n, P)."""

    queries: Floats
    thresholds: Floats
    values: Floats


def draw(rng: np.random.Generator, runs: int, size: int, uploads: int, variant: str) -> Draws:
    once = rng.laplace(size=(runs, uploads if variant == "paper" else 1))
    thresholds = np.broadcast_to(once, (runs, uploads))
    return Draws(rng.laplace(size=(runs, size)), thresholds, rng.laplace(size=(runs, size)))


@dataclass(frozen=True)
class Twin:
    """Right by default. ``*_off`` multiply a scale; ``fault`` names what is broken."""

    epsilon: float
    uploads: int
    bound: float
    threshold: float
    variant: str
    value_share: float = 0.5
    query_off: float = 1.0
    threshold_off: float = 1.0
    value_off: float = 1.0
    fault: str = ""

    def scales(self) -> tuple[float, float, float]:
        """Of threshold, query and value, written out a second time."""
        c = 1 if self.fault == "counter ignored" else self.uploads
        if self.variant == "paper":
            unit = 2 * c * (2 * self.bound)
            scales = (
                unit / (8 / 9 * self.epsilon),
                2 * unit / (8 / 9 * self.epsilon),
                unit / (2 / 9 * self.epsilon),
            )
        else:
            eps3 = self.value_share * self.epsilon
            ratio = (2 * c) ** (2 / 3)
            eps1 = (self.epsilon - eps3) / (1 + ratio)
            eps2 = eps1 * ratio
            scales = (self.bound / eps1, 2 * c * self.bound / eps2, c * 2 * self.bound / eps3)
        return scales[0] * self.threshold_off, scales[1] * self.query_off, scales[2] * self.value_off

    def __call__(self, delta: Floats, draws: Draws) -> Floats:
        """(n, P) released values, NaN where nothing was, for ``delta`` (P,) asked in order of index."""
        threshold_scale, query_scale, value_scale = self.scales()
        bounded = delta.clip(-self.bound, self.bound)
        released = np.full(draws.queries.shape, np.nan)
        runs = np.arange(len(released))
        uploaded = np.zeros(len(released), dtype=int)
        for j in range(len(delta)):
            turn = np.minimum(uploaded, draws.thresholds.shape[1] - 1)
            noised_threshold = self.threshold + threshold_scale * draws.thresholds[runs, turn]
            answer = abs(bounded[j]) + query_scale * draws.queries[:, j]
            upload = answer >= noised_threshold
            if self.fault != "never stops":
                upload &= uploaded < self.uploads
            noise = value_scale * draws.values[:, j]
            if self.fault == "values without noise":
                noise = 0 * noise
            if self.fault == "noise of the comparison again":
                noise = query_scale * draws.queries[:, j]
            value = bounded[j] + noise
            if self.fault == "noise before the bound":
                value = (delta[j] + noise).clip(-self.bound, self.bound)
            released[upload, j] = value[upload]
            uploaded += upload
        return released
