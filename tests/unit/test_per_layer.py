"""Quotas for each tensor: what they add up to, who gets the odd entry, and that each is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_ppdl.errors import ConfigurationError, SelectionError
from lightning_ppdl.privacy.events import GaussianRound
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.records import ParameterSpec
from lightning_ppdl.selection import (
    ErrorFeedback,
    LargestValues,
    PerLayer,
    RandomAboveThreshold,
    RandomFraction,
    Selection,
)
from lightning_ppdl.selection.per_layer import apportioned

all_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def specs(**sizes: int) -> tuple[ParameterSpec, ...]:
    """``specs(head_weight=6)`` is one tensor named ``head.weight`` with six entries."""
    return tuple(ParameterSpec(name.replace("_", "."), (size,), "float32") for name, size in sizes.items())


def numbered(sizes: list[int]) -> tuple[ParameterSpec, ...]:
    return tuple(ParameterSpec(f"layer{i}", (size,), "float32") for i, size in enumerate(sizes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chosen_of_each(selection: Selection, tensors: tuple[ParameterSpec, ...], delta: Tensor) -> list[int]:
    """How many entries of each tensor leave through the door."""
    release = PlainRelease(selection).for_tensors(tensors)
    indices = release.release(delta, generator()).indices.numpy()
    ends = np.cumsum([spec.size for spec in tensors])
    return np.diff(np.searchsorted(indices, [0, *ends])).tolist()  # type: ignore[no-any-return]


def values(tensors: tuple[ParameterSpec, ...], seed: int = 0) -> Tensor:
    """None of them zero."""
    return 1 + torch.rand(sum(spec.size for spec in tensors), generator=generator(seed))


@given(sizes=all_sizes, share=st.floats(0, 1))
def test_apportioned_by_largest_remainders(sizes: list[int], share: float) -> None:
    whole = sum(sizes)
    total = int(share * whole)
    parts = apportioned(total, sizes)
    assert sum(parts) == total
    exact = [total * size / whole for size in sizes]
    assert all(math.floor(e + 1e-9) <= part <= math.ceil(e - 1e-9) for e, part in zip(exact, parts))
    remainders = [total * size % whole for size in sizes]
    raised = [part > total * size // whole for part, size in zip(parts, sizes)]
    for i, j in ((i, j) for i in range(len(sizes)) for j in range(len(sizes))):
        if raised[i] and not raised[j]:
            assert remainders[i] > remainders[j] or (remainders[i] == remainders[j] and i < j)


@given(sizes=all_sizes, fraction=st.floats(0.02, 1.0), seed=st.integers(0, 5))
def test_each_tensor_sends_its_quota_and_all_together_no_more_than_the_fraction(
    sizes: list[int], fraction: float, seed: int
) -> None:
    tensors, whole = numbered(sizes), sum(sizes)
    total = int(fraction * whole + 1e-6)
    if total == 0:
        with pytest.raises(ConfigurationError, match="selects none"):
            PerLayer(LargestValues(fraction)).for_tensors(tensors)
        return
    delta = values(tensors, seed)
    for inner in (LargestValues(fraction), RandomFraction(fraction), RandomAboveThreshold(fraction, 0.5)):
        made = PerLayer(inner).for_tensors(tensors)
        assert made.count(whole) == total == LargestValues(fraction).count(whole)
        assert PlainRelease(PerLayer(inner)).for_tensors(tensors).max_fraction(whole) == total / whole
        assert chosen_of_each(PerLayer(inner), tensors, delta) == apportioned(total, sizes)


def test_what_is_chosen_are_the_largest_of_each_tensor() -> None:
    tensors = specs(backbone_weight=6, head_weight=4)
    delta = torch.tensor([9.0, -8.0, 7.0, -6.0, 5.0, 4.0, 0.1, -0.3, 0.2, 0.05])
    whole = LargestValues(0.5)
    assert whole.select(delta, generator()).tolist() == [0, 1, 2, 3, 4]
    assert PerLayer(whole).for_tensors(tensors).select(delta, generator()).tolist() == [0, 1, 2, 7, 8]


def test_a_small_tensor_may_get_nothing_unless_it_has_a_fraction_of_its_own() -> None:
    tensors = specs(weight=98, bias=2)
    assert chosen_of_each(PerLayer(LargestValues(0.1)), tensors, values(tensors)) == [10, 0]
    own = PerLayer(LargestValues(0.1), {"bias": 0.5})
    assert chosen_of_each(own, tensors, values(tensors)) == [9, 1]


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        (None, [7, 1, 2, 0]),
        ({}, [7, 1, 2, 0]),
        ({"head.*": 0.5}, [6, 1, 12, 1]),
        ({"head.*": 1.0}, [6, 1, 24, 2]),
        ({"*.bias": 0.25, "head.*": 0.5}, [6, 3, 12, 0]),
        ({"head.weight": 0.25, "head.*": 0.5}, [6, 1, 6, 1]),
        ({"*": 0.2}, [13, 2, 5, 0]),
    ],
)
def test_fractions_of_tensors_by_name(fractions: Mapping[str, float] | None, expected: list[int]) -> None:
    tensors = specs(body_weight=64, body_bias=10, head_weight=24, head_bias=2)
    selection = PerLayer(LargestValues(0.1), fractions)
    assert chosen_of_each(selection, tensors, values(tensors)) == expected
    release = PlainRelease(selection).for_tensors(tensors)
    assert release.max_fraction(100) == sum(expected) / 100


def test_zeros_leave_a_quota_unused() -> None:
    tensors = specs(a=4, b=4)
    delta = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert chosen_of_each(PerLayer(LargestValues(0.5)), tensors, delta) == [1, 2]
    assert chosen_of_each(PerLayer(LargestValues(0.5)), tensors, torch.zeros(8)) == [0, 0]
    assert chosen_of_each(PerLayer(LargestValues(1.0)), tensors, values(tensors)) == [4, 4]


def test_one_configuration_serves_modules_of_different_shapes() -> None:
    shared = PerLayer(LargestValues(0.5))
    first, second = specs(a=4, b=8), specs(a=6)
    one, other = shared.for_tensors(first), shared.for_tensors(second)
    assert (one.count(12), other.count(6)) == (6, 3)
    assert shared == PerLayer(LargestValues(0.5)) and shared.selection.fraction == 0.5


@dataclass(frozen=True)
class Own(Selection):
    """Somebody's own: the first entries."""

    fraction: float = 0.1

    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return torch.arange(self.count(len(delta)))


class OwnWithoutArguments(Own):
    fraction = 0.25

    def __init__(self) -> None: ...


class Greedy(Own):
    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return torch.arange(len(delta))


class BeyondItsTensor(Own):
    def select(self, delta: Tensor, generator: torch.Generator) -> Tensor:
        return torch.tensor([len(delta)])


@pytest.mark.parametrize("inner", [Own(0.25), OwnWithoutArguments()])
def test_anybodys_selection_gets_the_quotas(inner: Selection) -> None:
    tensors = specs(a=20, b=4)
    assert chosen_of_each(PerLayer(inner), tensors, values(tensors)) == [5, 1]
    assert inner.fraction == 0.25


@pytest.mark.parametrize("inner", [Greedy(0.25), BeyondItsTensor(0.25)])
def test_a_selection_that_reaches_beyond_its_tensor_is_named(inner: Selection) -> None:
    with pytest.raises(SelectionError, match=rf"{type(inner).__name__}\.select\(\)"):
        chosen_of_each(PerLayer(inner), specs(a=20, b=4), torch.ones(24))


def test_only_what_looks_at_values_counts_as_looking() -> None:
    tensors = specs(a=20, b=4)
    for wrap in (PerLayer, ErrorFeedback):
        assert not wrap(RandomFraction(0.5)).looks_at_data
        assert not wrap(RandomFraction(0.5)).for_tensors(tensors).looks_at_data
        assert wrap(LargestValues(0.5)).looks_at_data
        assert wrap(LargestValues(0.5)).for_tensors(tensors).looks_at_data


@pytest.mark.parametrize(("inner", "noised"), [(RandomFraction(0.5), 12), (LargestValues(0.5), 24)])
def test_under_participant_level_privacy_a_mask_by_tensor_is_noised_alone(
    inner: Selection, noised: int
) -> None:
    mechanism = ParticipantLevel(noise_multiplier=1e-6, delta=1e-5, clip=100.0)
    tensors = specs(a=20, b=4)
    made = mechanism.make_release(PerLayer(inner), None, SeededNoise(0, simulated=True))
    release = made.for_tensors(tensors)
    assert release.max_fraction(24) == 0.5
    delta = values(tensors)
    released = release.release(delta, generator())
    assert isinstance(released.event, GaussianRound) and released.event.size == noised
    assert int((released.indices >= 20).sum()) == 2 and len(released.indices) == 12
    torch.testing.assert_close(released.values, delta[released.indices], atol=1e-2, rtol=0)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"'hed\.\*' matches none of body\.weight, head\.weight"):
        PerLayer(fractions={"head.*": 0.5, "hed.*": 0.5}).for_tensors(specs(body_weight=64, head_weight=24))


def test_a_fraction_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"fractions\['bias'\]=0\.1 of 9 .* selects none"):
        PerLayer(LargestValues(0.5), {"bias": 0.1}).for_tensors(specs(weight=64, bias=9))


def test_without_the_tensors_nothing_is_chosen() -> None:
    with pytest.raises(ConfigurationError, match="for_tensors"):
        PerLayer().select(torch.ones(40), generator())
    with pytest.raises(ConfigurationError, match=r"an update of 40 entries, .* 24"):
        PerLayer().for_tensors(specs(a=20, b=4)).select(torch.ones(40), generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": 0.1}, r"selection=0\.1 must be a Selection"),
        ({"selection": PerLayer()}, "a tensor has one quota"),
        ({"selection": ErrorFeedback()}, r"ErrorFeedback\(PerLayer\(\.\.\.\)\)"),
        ({"fractions": {"a": 0}}, r"fractions\['a'\]=0 must be a number in \(0, 1\]"),
        ({"fractions": {"a": 1.5}}, r"fractions\['a'\]=1\.5 must"),
        ({"fractions": 0.5}, r"fractions=0\.5 must map"),
    ],
)
def test_what_cannot_work_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PerLayer(**arguments)
