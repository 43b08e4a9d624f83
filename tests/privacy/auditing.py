"""Statistical tools: is noise of the size it should be, and does a mechanism lose more than it claims.

A test that uses them shows that they accept what is right and reject what is 5% off.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

# A right sample is rejected, and a bound is too high, about once in so many times.
SIGNIFICANCE = 1e-6


def fits(samples: Floats, distribution: stats.rv_continuous, scale: float) -> bool:
    """Whether ``samples`` (n,) can be ``distribution`` (``stats.laplace`` or ``stats.norm``) around zero.

    Scale by maximum likelihood within its standard error, and shape by Kolmogorov and Smirnov.
    """
    if distribution is stats.laplace:
        estimate, relative_error = np.abs(samples).mean(), 1 / math.sqrt(len(samples))
    else:
        estimate, relative_error = math.sqrt((samples**2).mean()), 1 / math.sqrt(2 * len(samples))
    deviations = abs(estimate / scale - 1) / relative_error
    shape = stats.kstest(samples, distribution(scale=scale).cdf).pvalue
    return bool(2 * stats.norm.sf(deviations) > SIGNIFICANCE and shape > SIGNIFICANCE)


def happens_with(probability: float, hits: int, runs: int) -> bool:
    """Whether ``hits`` of ``runs`` can come from something of this probability."""
    return bool(stats.binomtest(hits, runs, probability).pvalue > SIGNIFICANCE)


def crossing_probability(margin: float, query: float, threshold: float) -> float:
    """P(Lap(query) >= margin + Lap(threshold)), in closed form; the scales must differ."""
    tail = abs(margin)
    above = (query**2 * math.exp(-tail / query) - threshold**2 * math.exp(-tail / threshold)) / (
        2 * (query**2 - threshold**2)
    )
    return above if margin >= 0 else 1 - above


def epsilon_at_least(first: Floats, second: Floats, delta: float = 0.0) -> float:
    """What any mechanism loses, at the least, whose output has these statistics on two neighbouring inputs.

    Half of the runs choose an event, "the statistic is at most (at least) t", and the direction; the other
    half bound its probabilities (Clopper and Pearson), so that the bound holds although we searched.

    Args:
        first: (n,) statistic of n runs on an input; infinity where it shows nothing.
        second: (n,) the same on a neighbour.
        delta: Of the claim.
    """
    cuts = np.concatenate([first[::2], second[::2]])
    cuts = np.unique(cuts[np.isfinite(cuts)])
    cuts = cuts[np.linspace(0, len(cuts) - 1, min(len(cuts), 60)).astype(int)]

    def bound(half: int, sign: int, swap: bool, cut: float) -> float:
        likely, unlikely = (second, first) if swap else (first, second)
        hits = [int((sign * runs[half::2] >= sign * cut).sum()) for runs in (likely, unlikely)]
        counts = [len(runs[half::2]) for runs in (likely, unlikely)]
        if hits[0] == 0:
            return 0.0
        low = stats.beta.ppf(SIGNIFICANCE, hits[0], counts[0] - hits[0] + 1)
        high = 1.0 if hits[1] == counts[1] else stats.beta.isf(SIGNIFICANCE, hits[1] + 1, counts[1] - hits[1])
        return math.log((low - delta) / high) if low > delta else 0.0

    events = [(sign, swap, cut) for sign in (1, -1) for swap in (False, True) for cut in cuts.tolist()]
    return max(0.0, bound(1, *max(events, key=lambda event: bound(0, *event))))
