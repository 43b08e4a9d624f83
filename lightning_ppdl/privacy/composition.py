"""What many private releases cost together: pure sums, Rényi DP and privacy loss distributions.

The numerics are Google's dp-accounting; this is the one file that imports it.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lightning_ppdl.errors import ConfigurationError

_PLD_MOST_EPSILON = 500.0
"""Beyond it exp(epsilon) overflows in the loss distributions, and nobody needs the digits."""
_PLD_LEAST_DELTA = 1e-10
"""Below it the rounding errors of the Fourier transforms that compose the distributions show."""
_PLD_MOST_STEPS = 1e5
"""Beyond it what each step's rounding adds to the loss distributions can outweigh what they gain."""
_FINEST = 2e-4
_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100
"""Their squares are still numbers. With less noise there is no bound; more is accounted for as this much."""
_RELATIVE = 1e-4
_WHOLE_ORDERS = (1.25, 1.5, *range(2, 65), 80, 96, 128, 192, 256, 512, 1024, 4096)
_ORDERS = (*(x / 20 for x in range(21, 40)), *(x / 10 for x in range(20, 110)), *_WHOLE_ORDERS[11:])
"""Fractional orders tell more and take far longer."""


@dataclass(frozen=True, order=True)
class Pure:
    """``count`` releases, each ``epsilon``-differentially private."""

    epsilon: float
    count: int = 1


@dataclass(frozen=True, order=True)
class Gaussian:
    """``count`` sums with Gaussian noise over Poisson samples; a rate of 1 takes everything.

    Args:
        noise_multiplier: sigma, over the sensitivity to adding or removing.
        sampling_rate: q.
        replace: Whether neighbours differ by replacement, which doubles the sensitivity and, with
            sampling, costs more than that alone.
        discrete: Whether the noise is discrete. What is proved of it is concentrated differential privacy
            (Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020),
            so only Rényi accounting holds.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    replace: bool = False
    count: float = 1
    discrete: bool = False


Costs = tuple[Pure | Gaussian, ...]


@dataclass(frozen=True)
class Bound:
    """An epsilon that holds, and by which accounting."""

    epsilon: float
    method: str


def tightest(costs: Costs, delta: float) -> Bound:
    """The smallest epsilon at ``delta`` that any of the three methods proves; infinite if none does."""
    return _tightest(_collapsed(costs), delta)


def pure_sum(costs: Costs) -> float:
    """The sum of all epsilons: holds at delta = 0; infinite with Gaussian noise among the costs."""
    if any(isinstance(cost, Gaussian) for cost in costs):
        return math.inf
    return sum(cost.epsilon * cost.count for cost in costs if isinstance(cost, Pure))


def rdp(costs: Costs, delta: float, orders: tuple[float, ...] = _ORDERS) -> float:
    """Epsilon at ``delta`` by Rényi differential privacy.

    Nothing tighter is known of replacement under sampling than that it costs no more than without sampling
    (Rényi divergence is quasi-convex, and both neighbours' outputs are mixtures over the same samples).
    """
    import numpy as np

    total = np.zeros(len(orders))
    halves = np.array(orders) / 2
    for cost in _collapsed(costs):
        if isinstance(cost, Pure):
            # Bun and Steinke 2016, proposition 3.3: epsilon-DP is epsilon^2 / 2-zCDP.
            with np.errstate(over="ignore"):
                total += cost.count * cost.epsilon * np.minimum(1.0, halves * cost.epsilon)
        elif cost.replace:
            total += cost.count * np.array(_rdp_of(cost.noise_multiplier / 2, 1.0, orders))
        else:
            total += cost.count * np.array(_rdp_of(cost.noise_multiplier, cost.sampling_rate, orders))
    return float(_dp_accounting().rdp.rdp_privacy_accountant.compute_epsilon(orders, total, delta)[0])


def pld(costs: Costs, delta: float) -> float:
    """Epsilon at ``delta`` by composing privacy loss distributions; infinite where they overflow."""
    costs = _collapsed(costs)
    if not costs:
        return 0.0
    # Only to choose a grid: replacement counts as half the noise there.
    rough = min(pure_sum(costs), rdp(tuple(_halved(cost) for cost in costs), delta, _WHOLE_ORDERS))
    if rough > _PLD_MOST_EPSILON or delta < _PLD_LEAST_DELTA:
        return math.inf
    interval = _interval(costs, rough)
    composed: Any = None
    for cost in costs:
        single = _loss(_once(cost), interval)
        repeated = single.self_compose(int(cost.count)) if cost.count > 1 else single
        composed = repeated if composed is None else composed.compose(repeated)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=65536)
def _tightest(costs: Costs, delta: float) -> Bound:
    bounds = [Bound(pure_sum(costs), "sum")]
    hidden = all(isinstance(cost, Pure) or cost.noise_multiplier >= _LEAST_NOISE for cost in costs)
    if delta > 0 and costs and hidden:
        if not any(isinstance(cost, Gaussian) and cost.discrete for cost in costs):
            bounds.append(Bound(pld(costs, delta), "PLD"))
        many = sum(cost.count for cost in costs if isinstance(cost, Gaussian)) > _PLD_MOST_STEPS
        if math.isinf(bounds[-1].epsilon) or many:  # otherwise Rényi DP is never tighter, and slow
            bounds.append(Bound(rdp(costs, delta), "RDP"))
    return min(bounds, key=lambda bound: bound.epsilon)


def _collapsed(costs: Costs) -> Costs:
    """Equal costs counted together. Gaussian noise without sampling needs one entry: precisions add."""
    counts: dict[Pure | Gaussian, float] = {}
    precision = 0.0
    discrete = False
    for cost in costs:
        if isinstance(cost, Gaussian) and cost.noise_multiplier < _LEAST_NOISE:
            return (cost,)  # whatever stands beside it
        if isinstance(cost, Gaussian) and cost.sampling_rate == 1:
            discrete |= cost.discrete
            noise = min(cost.noise_multiplier, _MOST_NOISE)
            precision += cost.count * ((2 if cost.replace else 1) / noise) ** 2
        else:
            counts[_once(cost)] = counts.get(_once(cost), 0) + cost.count
    pures = [Pure(cost.epsilon, int(count)) for cost, count in counts.items() if isinstance(cost, Pure)]
    sampled = [
        Gaussian(min(cost.noise_multiplier, _MOST_NOISE), cost.sampling_rate, cost.replace, int(count))
        for cost, count in counts.items()
        if isinstance(cost, Gaussian)
    ]
    whole = [Gaussian(precision**-0.5, discrete=discrete)] if precision else []
    return (*sorted(pures), *sorted(sampled), *whole)


def _once(cost: Pure | Gaussian) -> Pure | Gaussian:
    if isinstance(cost, Pure):
        return Pure(cost.epsilon)
    return Gaussian(cost.noise_multiplier, cost.sampling_rate, cost.replace)


def _halved(cost: Pure | Gaussian) -> Pure | Gaussian:
    if isinstance(cost, Pure) or not cost.replace:
        return cost
    return Gaussian(cost.noise_multiplier / 2, cost.sampling_rate, False, cost.count)


def _interval(costs: Costs, rough: float) -> float:
    """The grid of the losses: fine enough for four digits, coarse enough to be quick. Every loss is
    rounded up to it, so any grid is sound."""
    pures = [cost.epsilon for cost in costs if isinstance(cost, Pure)]
    if len(pures) == len(costs) == 1:
        return pures[0]  # its losses are +-epsilon: on this grid nothing is rounded
    # A power of two, so that neighbouring totals share their distributions.
    interval = max(_FINEST, 2.0 ** math.floor(math.log2(_RELATIVE * max(rough, 1e-9))))
    return max(min([interval, *(epsilon / 200 for epsilon in pures)]), rough / 1e6, _FINEST / 100)


@lru_cache(maxsize=256)
def _loss(cost: Pure | Gaussian, interval: float) -> Any:
    distribution = _dp_accounting().pld.privacy_loss_distribution
    if isinstance(cost, Pure):
        parameters = _dp_accounting().pld.common.DifferentialPrivacyParameters(cost.epsilon, 0)
        return distribution.from_privacy_parameters(parameters, interval)
    relation = _dp_accounting().NeighboringRelation
    return distribution.from_gaussian_mechanism(
        cost.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=cost.sampling_rate,
        neighboring_relation=relation.REPLACE_ONE if cost.replace else relation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=4096)
def _rdp_of(noise_multiplier: float, sampling_rate: float, orders: tuple[float, ...]) -> tuple[float, ...]:
    if sampling_rate == 1:
        return tuple(order / (2 * noise_multiplier**2) for order in orders)
    dp = _dp_accounting()
    event = dp.PoissonSampledDpEvent(sampling_rate, dp.GaussianDpEvent(noise_multiplier))
    return tuple(dp.rdp.RdpAccountant(orders).compose(event).rdp)


@lru_cache(maxsize=1)
def _dp_accounting() -> Any:
    try:
        import absl.logging
        import dp_accounting
        import dp_accounting.pld.common
        import dp_accounting.pld.privacy_loss_distribution
        import dp_accounting.rdp.rdp_privacy_accountant
    except ImportError as error:
        raise ConfigurationError(
            "accounting at a delta above 0 needs dp-accounting: pip install 'lightning_ppdl[privacy]'"
        ) from error
    # Its advice on the choice of orders is for its own users. Not before the import: absl makes the logger.
    logging.getLogger("absl").addFilter(lambda record: "dp_accounting" not in record.pathname)
    # Whoever configures logging later (Hydra does) has absl close its stream, unless it is this one: a
    # redirected sys.stderr (a test's, a notebook's) would be closed under its owner's feet.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
    return dp_accounting
