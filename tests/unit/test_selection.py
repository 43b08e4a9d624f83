"""Which entries leave: counts, order, ties, thresholds, and that random selection is uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.selection import LargestValues, RandomAboveThreshold, Selection

fractions = st.floats(0.01, 1.0)
# Few distinct magnitudes, so that ties are common; signed zeros included.
coarse = st.sampled_from([0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -2.0])

finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
deltas = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 80), elements=coarse),
    hnp.arrays(np.float32, st.integers(1, 80), elements=finite),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def select(selection: Selection, delta: Any, seed: int = 0) -> list[int]:
    indices = selection.select(torch.as_tensor(delta), generator(seed))
    assert indices.dtype == torch.int64 and indices.ndim == 1
    return [int(i) for i in indices]


def possible_count(fraction: float, size: int) -> int:
    return int(fraction * size + 1e-6)


@given(delta=deltas, fraction=fractions)
def test_largest_values_against_sorting(delta: Any, fraction: float) -> None:
    count = possible_count(fraction, len(delta))
    selection = LargestValues(fraction)
    if count == 0:
        with pytest.raises(ConfigurationError, match=r"fraction=.*selects none"):
            select(selection, delta)
        return
    by_magnitude = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))
    expected = sorted(i for i in by_magnitude[:count] if delta[i] != 0)
    assert select(selection, delta) == expected


@given(delta=deltas, fraction=fractions, threshold=st.sampled_from([0.0, 0.25, 0.5, 3.0]))
def test_random_above_threshold_takes_only_candidates(delta: Any, fraction: float, threshold: float) -> None:
    count = possible_count(fraction, len(delta))
    if count == 0:
        return
    chosen = select(RandomAboveThreshold(fraction, threshold), delta)
    candidates = np.flatnonzero(np.abs(delta) > np.float32(threshold)).tolist()
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(candidates)
    assert len(chosen) == min(count, len(candidates))


@pytest.mark.parametrize("make", [LargestValues, RandomAboveThreshold])
def test_edge_cases(make: Callable[..., Selection]) -> None:
    assert select(make(0.5), torch.zeros(10)) == []
    assert select(make(1.0), [1.0, 0.0, -3.0, 2.0]) == [0, 2, 3]
    assert select(make(1.0), [5.0]) == [0]


def test_the_lowest_indices_win_ties() -> None:
    assert select(LargestValues(0.5), [1.0, -1.0, 1.0, -1.0]) == [0, 1]
    assert select(LargestValues(0.5), [0.5, -1.0, 0.5, 0.5]) == [0, 1]


def test_the_threshold_is_strict() -> None:
    delta = torch.tensor([0.25, -0.25, 0.2500001, -0.2500001])
    assert select(RandomAboveThreshold(1.0, 0.25), delta) == [2, 3]
    assert select(RandomAboveThreshold(1.0, 0.0), [0.0, 1e-40, -0.0]) == [1]


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    # The first three fall short of the whole number in binary.
    [(0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.1, 140_106, 14_010), (1.0, 7, 7), (0.999, 7, 6)],
)
def test_count_is_the_floor(fraction: float, size: int, count: int) -> None:
    assert LargestValues(fraction).count(size) == count
    assert RandomAboveThreshold(fraction).count(size) == count


def test_a_fraction_of_nothing_says_what_would_do() -> None:
    with pytest.raises(ConfigurationError, match=r"fraction=0\.1 of 9 .* fraction=0\.11"):
        LargestValues(0.1).count(9)


class _TakesTheFirst(Selection):
    """Negative control: within the count, above the threshold, and not random at all."""

    fraction = 0.1

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return delta.abs().nonzero().squeeze(1)[: self.count(len(delta))]


class _LeansToTheEnd(Selection):
    """Negative control: a sample, but entries at the end are 20% likelier than at the start."""

    fraction = 0.1

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        weights = torch.linspace(1.0, 1.2, len(delta))
        return torch.multinomial(weights, self.count(len(delta)), generator=generator).sort().values


def chi_square_per_degree(selection: Selection, size: int = 50, draws: int = 10_000) -> float:
    """Chi-square statistic over degrees of freedom of how often each entry was chosen: 1 if uniform."""
    counts = np.zeros(size)
    stream = generator(1)
    delta = torch.linspace(1.0, 9.0, size) * torch.where(torch.arange(size) % 2 == 0, 1, -1)
    for _ in range(draws):
        counts[selection.select(delta, stream).numpy()] += 1
    p = selection.count(size) / size
    return float(((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) / (size - 1))


def test_random_selection_is_uniform_whatever_the_magnitude() -> None:
    # 49 degrees of freedom: beyond 1.9 with probability below 2e-4.
    assert 0.4 < chi_square_per_degree(RandomAboveThreshold(0.1, threshold=0.5)) < 1.9


@pytest.mark.parametrize("biased", [_TakesTheFirst(), _LeansToTheEnd(), LargestValues(0.1)])
def test_the_uniformity_test_rejects_biased_selections(biased: Selection) -> None:
    assert chi_square_per_degree(biased) > 1.9


def test_random_selection_draws_from_its_generator_only() -> None:
    delta = torch.randn(500, generator=generator())
    selection = RandomAboveThreshold(0.1, 0.01)
    before = torch.random.get_rng_state()
    first, again, other = (select(selection, delta, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


@given(delta=deltas)
@settings(max_examples=30)
def test_the_update_itself_is_left_alone(delta: Any) -> None:
    before = delta.copy()
    for selection in (LargestValues(1.0), LargestValues(0.9), RandomAboveThreshold(1.0)):
        if possible_count(selection.fraction, len(delta)):
            select(selection, delta)
    np.testing.assert_array_equal(delta, before)


@pytest.mark.parametrize("make", [LargestValues, RandomAboveThreshold])
@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.1, float("nan"), float("inf"), "0.1", None, True])
def test_bad_fractions_are_named(make: Callable[..., Selection], fraction: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        make(fraction=fraction)
    assert f"fraction={fraction!r}" in str(raised.value)


@pytest.mark.parametrize("threshold", [-1e-9, float("nan"), float("inf"), "0", None, False])
def test_bad_thresholds_are_named(threshold: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        RandomAboveThreshold(threshold=threshold)
    assert f"threshold={threshold!r}" in str(raised.value)
