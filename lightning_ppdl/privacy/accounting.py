"""The total cost of private releases: epsilon at a delta, for a unit, under a neighbouring relation.

A total holds for any sequence of events whose settings were fixed in advance, or chosen from earlier
releases' *outputs* no more than the plan says; stopping early only leaves part of the plan unspent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy import composition
from lightning_ppdl.privacy.composition import Gaussian, Pure
from lightning_ppdl.privacy.events import GaussianRound, PrivacyEvent, PrivateSteps, SparseVectorRound, Unit
from lightning_ppdl.validation import require_count, require_fraction, require_positive

NOTHING_RELEASED = "nothing was released yet"
REPLACED = {
    "participant": "replacement of one participant's whole data set",
    "record": "replacement of one record",
}
_SLACK = 1 + 1e-9
"""Three rounds of 0.1 fit into 0.3: what floating point adds is no spending."""
_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e7


@dataclass(frozen=True)
class Spent:
    """A total: (``epsilon``, ``delta``)-differential privacy.

    Args:
        epsilon: Never below what the method proves.
        delta: The probability with which the guarantee may fail.
        unit: Whose presence is hidden.
        neighbours: The neighbouring relation, in words.
        method: ``"sum"``, ``"RDP"`` or ``"PLD"``: the accounting that gave the smallest epsilon.
    """

    epsilon: float
    delta: float
    unit: Unit
    neighbours: str
    method: str

    def __str__(self) -> str:
        if self.neighbours == NOTHING_RELEASED:
            return NOTHING_RELEASED
        return f"epsilon {round_up(self.epsilon)} at delta {self.delta:g} for {self.neighbours}"


def total(
    events: Iterable[PrivacyEvent], delta: float, *, unit: Unit | None = None, replace: bool = False
) -> Spent:
    """What ``events`` cost together: the smallest epsilon that summing, Rényi DP or privacy loss
    distributions prove at ``delta``.

    Args:
        events: In any order; equal ones are counted together.
        delta: In [0, 1). At 0 only pure mechanisms have a total: the plain sum.
        unit: Whom the total is for; by default the record if any event protects only records. A record
            is covered by participant-level events too, at their replacement cost where they are Gaussian:
            another record makes another update, not none.
        replace: Neighbours that differ by replacement where the events' own differ by presence; costs more.

    Raises:
        ConfigurationError: if there is no finite total: Gaussian noise at delta = 0, a total for participants
            over record-level events, an event without noise or of a kind that has no accounting.

    Example:
        >>> run = [PrivateSteps(noise_multiplier=1.44, sampling_rate=0.2, clip=1.0, steps=100)]
        >>> print(total(run, 1e-5))
        epsilon 8.031 at delta 1e-05 for presence or absence of one record (add/remove)
    """
    counted = _counted(events)
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 <= delta < 1:
        raise ConfigurationError(f"delta={delta!r} must be in [0, 1), e.g. delta=1e-5")
    units = {event.unit for event in counted}
    unit = unit or ("record" if "record" in units else "participant")
    if unit == "participant" and "record" in units:
        raise ConfigurationError(
            "unit='participant' has no total: record-level releases (DP-SGD) protect no whole participant; "
            "ask for unit='record'"
        )
    costs = tuple(_cost(event, count, unit, replace) for event, count in counted.items())
    if delta == 0 and any(isinstance(cost, Gaussian) for cost in costs):
        raise ConfigurationError(
            "delta=0 has no finite epsilon under Gaussian noise; give a delta well below one over the number "
            "of records, e.g. delta=1e-5"
        )
    bound = composition.tightest(costs, delta)
    if math.isinf(bound.epsilon) or math.isnan(bound.epsilon):
        raise ConfigurationError(
            f"these releases have no finite epsilon at delta={delta!r}; add noise, or raise delta"
        )
    return Spent(bound.epsilon, delta, unit, _neighbours(counted, unit, replace), bound.method)


def require_accountable(event: PrivacyEvent) -> PrivacyEvent:
    """Return ``event`` if it has a cost that can be accounted for.

    Raises:
        ConfigurationError: naming what is wrong with it.
    """
    _cost(event, 1, event.unit, False)
    return event


def in_parallel(totals: Iterable[Spent]) -> Spent:
    """The total over participants with disjoint data: the largest of theirs.

    A record that two of them hold costs more: their totals compose.

    Raises:
        ConfigurationError: for no totals, or totals at different deltas or for different units.
    """
    totals = list(totals)
    if not totals or len({(spent.delta, spent.unit) for spent in totals}) > 1:
        raise ConfigurationError("in_parallel() needs totals at one delta for one unit, at least one of them")
    return max(totals, key=lambda spent: spent.epsilon)


def calibrate_noise(
    make_event: Callable[[float], PrivacyEvent], count: int, epsilon: float, delta: float
) -> float:
    """The smallest noise multiplier, rounded up to four significant digits, with which ``count`` events stay
    within ``epsilon`` at ``delta``.

    Args:
        make_event: The event at a noise multiplier; more noise must never cost more.
        count: Such events in the whole run.

    Raises:
        ConfigurationError: if no noise multiplier up to ten million is enough.

    Example:
        >>> calibrate_noise(lambda sigma: PrivateSteps(sigma, 0.2, 1.0, steps=1), 60, epsilon=1.0, delta=1e-5)
        5.989
    """
    require_count("count", count)
    require_positive("epsilon", epsilon)

    def cost(noise: float) -> float:
        return total(_repeated(make_event(noise), count), delta).epsilon / _SLACK

    # Over a grid of all numbers with four digits: too little noise below, enough above.
    below, above = _grid_index(_LEAST_NOISE), _grid_index(_MOST_NOISE)
    guess, last = _grid_index(1.0), None
    while above - below > 1:
        guess = min(max(guess, below + 1), above - 1)
        noise = _grid_value(guess)
        spent = cost(noise)
        below, above = (below, guess) if spent <= epsilon else (guess, above)
        # Epsilon falls about as a power of the noise: where a line in logarithms meets the target.
        x, y = math.log(noise), math.log(max(spent, 1e-9) / epsilon)
        slope = -1.0 if last is None or last[0] == x else min((y - last[1]) / (x - last[0]), -0.3)
        guess, last = _grid_index(math.exp(x - y / slope)), (x, y)
    if above == _grid_index(_MOST_NOISE):
        raise ConfigurationError(
            f"epsilon={epsilon!r} at delta={delta!r} is out of reach for {count} releases, whatever the "
            f"noise; raise epsilon or delta"
        )
    return _grid_value(above)


def affordable(
    spent: Sequence[PrivacyEvent],
    event: PrivacyEvent,
    max_epsilon: float,
    delta: float,
    most: int,
    unit: Unit | None = None,
) -> int:
    """How many more of ``event``, up to ``most``, fit into ``max_epsilon`` at ``delta`` after ``spent``.

    ``unit`` is as in :func:`total`.
    """
    require_positive("max_epsilon", max_epsilon)
    spent = list(spent)

    def fits(count: int) -> bool:
        more = _repeated(event, count) if count else []
        return total([*spent, *more], delta, unit=unit).epsilon <= max_epsilon * _SLACK

    if fits(most):
        return most
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(low, 0)


def fits(spent: Spent, max_epsilon: float) -> bool:
    """Whether a total is within a budget, leaving aside what floating point adds."""
    return spent.epsilon <= max_epsilon * _SLACK


def per_parameter_epsilon(event: PrivacyEvent) -> float | None:
    """The paper's figure: epsilon / c for one released value of one round. No guarantee by itself, since
    a round costs all of its epsilon; None for other mechanisms."""
    return event.epsilon / event.uploads if isinstance(event, SparseVectorRound) else None


def round_up(value: float, digits: int = 4) -> float:
    """``value`` with ``digits`` significant digits, never below it; 0 and infinity stay.

    >>> round_up(1.00001), round_up(14010.0), round_up(0.00123456), round_up(5.99)
    (1.001, 14010.0, 0.001235, 5.99)
    """
    if value == 0 or math.isinf(value):
        return value
    # What floating point left in the last bits must not become a digit.
    value = float(f"{value:.12g}")
    nearest = float(f"{value:.{digits}g}")
    if nearest >= value:
        return nearest
    exponent = math.floor(math.log10(abs(value))) - digits + 1
    return float(f"{nearest + 10.0**exponent:.{digits}g}")


def _grid_index(value: float) -> int:
    """The place of the next number with four digits, from ``value`` upwards, among all of them."""
    value = round_up(min(max(value, _LEAST_NOISE), _MOST_NOISE))
    exponent = math.floor(math.log10(value) + 1e-9)
    return exponent * 9000 + round(value / 10.0**exponent * 1000) - 1000


def _grid_value(index: int) -> float:
    exponent, place = divmod(index, 9000)
    return float(f"{place + 1000}e{exponent - 3}")


def _repeated(event: PrivacyEvent, count: int) -> list[PrivacyEvent]:
    if isinstance(event, PrivateSteps):
        return [
            PrivateSteps(
                event.noise_multiplier, event.sampling_rate, event.clip, event.steps * count, event.exact
            )
        ]
    return [event] * count


def _counted(events: Iterable[PrivacyEvent]) -> dict[PrivacyEvent, int]:
    counted: dict[PrivacyEvent, int] = {}
    for event in events:
        counted[event] = counted.get(event, 0) + 1
    return counted


def _cost(event: PrivacyEvent, count: int, unit: Unit, replace: bool) -> Pure | Gaussian:
    if isinstance(event, SparseVectorRound):
        return Pure(require_positive("epsilon", event.epsilon), count)  # any change: replacement included
    if isinstance(event, GaussianRound):
        noise = require_positive("noise_multiplier", event.noise_multiplier)
        return Gaussian(noise, 1.0, replace or unit == "record", count, discrete=event.exact)
    if isinstance(event, PrivateSteps):
        noise = require_positive("noise_multiplier", event.noise_multiplier)
        rate = require_fraction("sampling_rate", event.sampling_rate)
        return Gaussian(noise, rate, replace, count * require_count("steps", event.steps))
    raise ConfigurationError(
        f"there is no accounting for {type(event).__name__} events; the known ones are SparseVectorRound, "
        f"GaussianRound and PrivateSteps"
    )


def _neighbours(events: Iterable[PrivacyEvent], unit: Unit, replace: bool) -> str:
    """The relation that every one of the events covers."""
    kinds = {type(event): event.neighbours for event in events}
    if not kinds:
        return NOTHING_RELEASED
    if set(kinds) == {SparseVectorRound}:
        return kinds[SparseVectorRound]
    if replace:
        return REPLACED[unit]
    if PrivateSteps in kinds:
        return PrivateSteps.neighbours
    return GaussianRound.neighbours if unit == "participant" else REPLACED["record"]
