"""Totals against published figures, and the laws that every accounting obeys."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.privacy import composition
from lightning_ppdl.privacy.accounting import (
    NOTHING_RELEASED,
    affordable,
    calibrate_noise,
    fits,
    in_parallel,
    per_parameter_epsilon,
    round_up,
    total,
)
from lightning_ppdl.privacy.composition import Gaussian
from lightning_ppdl.privacy.events import GaussianRound, PrivacyEvent, PrivateSteps, SparseVectorRound

DELTA = 1e-5


def sparse(epsilon: float, uploads: int = 10) -> SparseVectorRound:
    return SparseVectorRound(epsilon, uploads, size=1000, bound=0.001, threshold=0.0001, variant="paper")


def steps(sigma: float, count: int, rate: float = 0.2) -> PrivateSteps:
    return PrivateSteps(sigma, rate, clip=1.0, steps=count)


def gaussian(sigma: float) -> GaussianRound:
    return GaussianRound(sigma, clip=1.0, size=1000)


# Known answers


@pytest.mark.parametrize(
    ("rate", "count", "sigma", "pld", "rdp"),
    [
        (0.2, 100, 1.44, 8.03, 8.82),
        (0.2, 100, 2.38, 3.99, 4.36),
        (0.2, 60, 3.32, 2.00, 2.20),
        (0.2, 60, 5.99, 1.00, 1.10),
    ],
)
def test_the_figures_this_project_is_held_to(
    rate: float, count: int, sigma: float, pld: float, rdp: float
) -> None:
    costs = (Gaussian(sigma, rate, count=count),)
    assert composition.pld(costs, DELTA) == pytest.approx(pld, abs=0.006)
    assert composition.rdp(costs, DELTA) == pytest.approx(rdp, abs=0.006)
    spent = total([steps(sigma, count, rate)], DELTA)
    assert (spent.method, spent.unit) == ("PLD", "record")
    assert spent.epsilon == composition.pld(costs, DELTA)


def test_replacement_costs_nearly_twice() -> None:
    run = [steps(1.44, 100)]
    assert total(run, DELTA).epsilon == pytest.approx(8.03, abs=0.005)
    replaced = total(run, DELTA, replace=True)
    assert replaced.epsilon == pytest.approx(14.7, abs=0.05)
    assert replaced.neighbours == "replacement of one record"


def test_a_record_in_two_places() -> None:
    assert total([steps(1.44, 200)], DELTA).epsilon == pytest.approx(11.8, abs=0.05)


def test_opacus_published_figures() -> None:
    """Opacus 1.6, tests/accountants_test.py: sigma 1.5, q 0.04, 2,250 steps; its PRV accountant is the
    counterpart of our loss distributions, and allows itself an error of 0.01."""
    costs = (Gaussian(1.5, 0.04, count=2250),)
    assert composition.rdp(costs, DELTA) == pytest.approx(7.32911117143, rel=1e-3)
    assert composition.pld(costs, DELTA) == pytest.approx(6.777395712150674, abs=0.015)


def test_opacus_published_calibration() -> None:
    noise = calibrate_noise(lambda sigma: steps(sigma, 1, 0.04), 2000, epsilon=8.0, delta=DELTA)
    assert noise == pytest.approx(1.2915, abs=0.003)


def test_the_gaussian_mechanism_has_an_exact_answer() -> None:
    """Balle and Wang 2018, theorem 8, turned around: delta at the epsilon that was given."""
    sigma = 3.0
    epsilon = total([gaussian(sigma)], DELTA).epsilon

    def normal_cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    mu = 1 / sigma
    delta = normal_cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal_cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(DELTA, rel=2e-3)
    assert delta <= DELTA


def test_pure_rounds_add_up_at_delta_zero() -> None:
    spent = total([sparse(0.1)] * 30, 0.0)
    assert spent.epsilon == pytest.approx(3.0, rel=1e-12)
    assert (spent.method, spent.delta) == ("sum", 0.0)


def test_pure_rounds_compose_tighter_with_a_delta() -> None:
    """100 rounds of 0.1: the optimal composition (Kairouz et al. 2015) is a binomial sum."""
    spent = total([sparse(0.1)] * 100, DELTA)
    assert spent.method == "PLD"

    def delta_at(epsilon: float) -> float:
        p = 1 / (1 + math.exp(-0.1))
        return sum(
            math.comb(100, k)
            * max(0.0, p**k * (1 - p) ** (100 - k) - math.exp(epsilon) * p ** (100 - k) * (1 - p) ** k)
            for k in range(101)
        )

    assert delta_at(spent.epsilon) == pytest.approx(DELTA, rel=1e-6)


def test_a_round_is_charged_in_full_and_per_parameter_is_an_extra() -> None:
    event = sparse(14_010.0, uploads=14_010)
    assert per_parameter_epsilon(event) == 1.0
    assert per_parameter_epsilon(steps(1.0, 1)) is None
    for delta in (0.0, DELTA):
        assert total([event] * 30, delta).epsilon == 30 * 14_010.0


# Laws


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sigma=st.floats(0.6, 20),
    rate=st.sampled_from([0.01, 0.2, 1.0]),
    count=st.integers(1, 200),
    more=st.integers(1, 100),
    louder=st.floats(1.01, 3),
)
def test_more_steps_cost_more_and_more_noise_less(
    sigma: float, rate: float, count: int, more: int, louder: float
) -> None:
    epsilon = total([steps(sigma, count, rate)], DELTA).epsilon
    assert total([steps(sigma, count + more, rate)], DELTA).epsilon >= epsilon * (1 - 1e-3)
    assert total([steps(sigma * louder, count, rate)], DELTA).epsilon <= epsilon * (1 + 1e-3)
    by_renyi = composition.rdp((Gaussian(sigma, rate, count=count),), DELTA, orders=(1.5, *range(2, 64)))
    assert epsilon <= by_renyi * (1 + 1e-3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(epsilon=st.floats(1e-3, 1e5), count=st.integers(1, 500), delta=st.sampled_from([0, 1e-12, 1e-5]))
def test_no_total_passes_the_plain_sum(epsilon: float, count: int, delta: float) -> None:
    spent = total([sparse(epsilon)] * count, delta)
    assert 0 < spent.epsilon <= epsilon * count * (1 + 1e-9)


def test_order_and_grouping_do_not_matter() -> None:
    one = [steps(2.0, 10), gaussian(8.0), sparse(0.2), steps(2.0, 5), gaussian(8.0)]
    other = [sparse(0.2), gaussian(8.0), gaussian(8.0), steps(2.0, 15)]
    assert total(one, DELTA) == total(other, DELTA)
    clipped_elsewhere = [PrivateSteps(2.0, 0.2, clip=0.3, steps=15)]
    assert total(clipped_elsewhere, DELTA) == total([steps(2.0, 15)], DELTA)


# Units and relations


def test_a_record_total_covers_participant_events_at_their_replacement_cost() -> None:
    mixed = total([steps(2.0, 50), gaussian(10.0)], DELTA)
    assert mixed.unit == "record"
    by_presence = composition.tightest((Gaussian(2.0, 0.2, count=50), Gaussian(10.0)), DELTA).epsilon
    by_half = composition.tightest((Gaussian(2.0, 0.2, count=50), Gaussian(5.0)), DELTA).epsilon
    assert mixed.epsilon == by_half > by_presence
    assert total([gaussian(10.0)], DELTA, unit="record").epsilon == total([gaussian(5.0)], DELTA).epsilon


def test_a_participant_total_over_record_events_does_not_exist() -> None:
    with pytest.raises(ConfigurationError, match="unit='participant'"):
        total([sparse(0.1), steps(2.0, 50)], DELTA, unit="participant")


def test_the_relation_is_the_weakest_one_among_the_events() -> None:
    assert total([sparse(0.1)], 0).neighbours == SparseVectorRound.neighbours
    assert total([sparse(0.1), gaussian(5.0)], DELTA).neighbours == GaussianRound.neighbours
    assert total([sparse(0.1), steps(5.0, 1)], DELTA).neighbours == PrivateSteps.neighbours
    assert "replacement" in total([gaussian(5.0)], DELTA, replace=True).neighbours


def test_disjoint_participants_compose_in_parallel() -> None:
    totals = [total([steps(sigma, 60)], DELTA) for sigma in (5.99, 3.32)]
    assert in_parallel(totals) == totals[1]
    with pytest.raises(ConfigurationError, match="one delta"):
        in_parallel([totals[0], total([steps(3.32, 60)], 1e-6)])


def test_nothing_costs_nothing() -> None:
    spent = total([], DELTA)
    assert (spent.epsilon, spent.neighbours) == (0.0, NOTHING_RELEASED)


# Refusals


def test_gaussian_noise_has_no_pure_epsilon() -> None:
    for event in (gaussian(10.0), steps(10.0, 1)):
        with pytest.raises(ConfigurationError, match=r"delta=0 .* e\.g\. delta=1e-5"):
            total([sparse(0.1), event], 0.0)


@pytest.mark.parametrize("delta", [-1e-9, 1.0, math.nan, True, "1e-5"])
def test_a_delta_out_of_range(delta: float) -> None:
    with pytest.raises(ConfigurationError, match="delta="):
        total([gaussian(1.0)], delta)


def test_no_noise_has_no_epsilon() -> None:
    with pytest.raises(ConfigurationError, match=r"noise_multiplier=0\.0"):
        total([steps(0.0, 10)], DELTA)


def test_an_event_of_unknown_kind_is_not_passed_over() -> None:
    @dataclass(frozen=True)
    class Novel(PrivacyEvent):
        kind = "novel"
        unit = "participant"
        neighbours = "whoever"

    with pytest.raises(ConfigurationError, match="no accounting for Novel"):
        total([Novel()], DELTA)


def test_extremes_do_not_crash_and_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="absl"):
        assert total([gaussian(0.01)] * 100, DELTA).epsilon > 1000
        assert total([steps(0.3, 1000, 0.5)], DELTA).method == "RDP"
        assert total([steps(100.0, 1, 0.001)], DELTA).epsilon < 0.01
        assert total([steps(1.0, 100)], 1e-15).method == "RDP"
    assert not caplog.records


def test_without_dp_accounting_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['dp_accounting'] = None\n"
        "from lightning_ppdl.errors import ConfigurationError\n"
        "from lightning_ppdl.privacy.accounting import total\n"
        "from lightning_ppdl.privacy.events import GaussianRound, SparseVectorRound\n"
        "print(total([SparseVectorRound(0.5, 1, 1, 1.0, 0.0, 'paper')], 0).epsilon)\n"
        "try: total([GaussianRound(1.0, 1.0, 1)], 1e-5)\n"
        "except ConfigurationError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0] == "0.5"
    assert "pip install 'lightning_ppdl[privacy]'" in out


# Planning


@pytest.mark.parametrize(
    ("epsilon", "count", "sigma"), [(8.0, 100, 1.444), (4.0, 100, 2.376), (2.0, 60, 3.323), (1.0, 60, 5.989)]
)
def test_the_noise_a_target_needs(epsilon: float, count: int, sigma: float) -> None:
    found = calibrate_noise(lambda noise: steps(noise, 1), count, epsilon, DELTA)
    assert found == sigma
    assert total([steps(found, count)], DELTA).epsilon <= epsilon
    assert total([steps(found - 0.001, count)], DELTA).epsilon > epsilon


def test_a_small_target_for_the_gaussian_mechanism() -> None:
    found = calibrate_noise(gaussian, 100, 1.0, DELTA)
    assert total([gaussian(found)] * 100, DELTA).epsilon <= 1.0
    assert found == pytest.approx(37.3, abs=0.05)


def test_a_target_out_of_reach() -> None:
    with pytest.raises(ConfigurationError, match="out of reach"):
        calibrate_noise(lambda noise: sparse(1.0), 10, 1.0, 0.0)


def test_what_a_budget_affords() -> None:
    spent, event = [steps(5.989, 6)], steps(5.989, 6)
    assert affordable(spent, event, 1.0, DELTA, most=100) == 9
    assert affordable(spent, event, 1.0, DELTA, most=4) == 4
    assert affordable([steps(1.0, 100)], event, 1.0, DELTA, most=5) == 0
    assert affordable([], sparse(0.1), 0.3, 0.0, most=100) == 3  # although 3 * 0.1 > 0.3 in doubles
    assert fits(total([sparse(0.1)] * 3, 0.0), 0.3) and not fits(total([sparse(0.1)] * 4, 0.0), 0.3)


@given(value=st.floats(1e-12, 1e12), digits=st.integers(1, 8))
def test_rounding_is_never_down(value: float, digits: int) -> None:
    rounded = round_up(value, digits)
    assert value * (1 - 1e-11) <= rounded <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-9)
    assert round_up(rounded, digits) == rounded


def test_equal_schedules_are_accounted_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation of 90 participants asks for the same totals 90 times."""
    calls = []
    original = composition.pld

    def counting(costs: composition.Costs, delta: float) -> float:
        calls.append(costs)
        return original(costs, delta)

    monkeypatch.setattr(composition, "pld", counting)
    event = steps(7.77, 3)
    for _ in range(90):
        for rounds in (1, 2, 3):
            total([event] * rounds, DELTA)
    assert len(calls) == 3


def test_exact_gaussian_noise_is_accounted_for_by_what_is_proved_of_it() -> None:
    continuous = total([GaussianRound(2.0, 1.0, 10)] * 5, 1e-5)
    exact = total([GaussianRound(2.0, 1.0, 10, exact=True)] * 5, 1e-5)
    assert (continuous.method, exact.method) == ("PLD", "RDP")
    assert continuous.epsilon < exact.epsilon < 1.2 * continuous.epsilon
    assert total([GaussianRound(2.0, 1.0, 10), GaussianRound(2.0, 1.0, 10, exact=True)], 1e-5).method == "RDP"


def test_accounting_leaves_a_redirected_stderr_open() -> None:
    """Logging that is configured later closes the handlers there are, and with them what absl writes to."""
    code = (
        "import io, logging.config, sys\n"
        "sys.stderr = redirected = io.StringIO()\n"
        "from lightning_ppdl.privacy.accounting import total\n"
        "from lightning_ppdl.privacy.events import GaussianRound\n"
        "total([GaussianRound(1.0, 1.0, 1)], 1e-5)\n"
        "sys.stderr = sys.__stderr__\n"
        "logging.config.dictConfig({'version': 1})\n"
        "print(redirected.closed)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "False", ran.stderr


# Everywhere


def epsilon_or_none(sigma: float, rate: float, count: int, delta: float, replace: bool) -> float:
    try:
        return total([steps(sigma, count, rate)], delta, replace=replace).epsilon
    except ConfigurationError:
        return math.inf


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sigma=st.sampled_from([1e-300, 1e-3, 0.5, 5.0, 20.0, 1e5, 1e300]),
    rate=st.sampled_from([1e-300, 1e-5, 1e-4, 0.2, 1.0]),
    count=st.sampled_from([1, 100, 10**4]),
    delta=st.sampled_from([1e-300, 1e-8, 1e-5, 0.5, 0.9, 0.999999]),
    replace=st.booleans(),
)
def test_every_setting_has_a_total_or_is_refused(
    sigma: float, rate: float, count: int, delta: float, replace: bool
) -> None:
    epsilon = epsilon_or_none(sigma, rate, count, delta, replace)
    assert epsilon >= 0
    most = epsilon * 1.01 + 2e-3  # losses are rounded up to a grid
    assert epsilon_or_none(sigma * 2, rate, count, delta, replace) <= most
    assert epsilon_or_none(sigma, rate, count, (1 + delta) / 2, replace) <= most
    assert epsilon_or_none(sigma, rate / 2, count, delta, replace) <= most
    assert epsilon_or_none(sigma, rate, count * 2, delta, replace) * 1.01 + 2e-3 >= epsilon


@pytest.mark.parametrize("epsilon", [1e-300, 1e-8, 0.3, 400.0, 1e300])
@pytest.mark.parametrize("delta", [1e-5, 0.5, 0.9])
def test_pure_rounds_of_every_size(epsilon: float, delta: float) -> None:
    assert 0 <= total([sparse(epsilon)] * 3, delta).epsilon <= 3 * epsilon * (1 + 1e-9)


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_noise_that_is_next_to_none_has_no_finite_epsilon(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="no finite epsilon"):
        total([steps(1e-300, 1, rate), gaussian(5.0)], DELTA)
    with pytest.raises(ConfigurationError, match="no finite epsilon"):
        total([sparse(1.7e308)] * 2, DELTA)


def test_settings_that_no_step_can_have() -> None:
    with pytest.raises(ConfigurationError, match=r"sampling_rate=1\.5"):
        total([steps(1.0, 1, 1.5)], DELTA)
    with pytest.raises(ConfigurationError, match="steps=0"):
        total([steps(1.0, 0)], DELTA)


def test_a_great_many_steps_are_not_cheaper_at_a_smaller_delta() -> None:
    run = [steps(5.0, 10**6, 1e-5)]
    assert total(run, 1e-12).epsilon >= total(run, 1e-8).epsilon


def test_nothing_released_reads_so() -> None:
    assert str(total([], DELTA)) == "nothing was released yet"
