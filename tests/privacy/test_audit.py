"""What the mechanisms lose, measured on neighbouring inputs: never more than claimed; and the same
measurement convicts mechanisms that are broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from auditing import Floats, epsilon_at_least
from sparse_vector_twin import Twin, draw

from lightning_ppdl.privacy.mechanism import Plan
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.selection import LargestValues, RandomFraction, Selection

BOUND = 1e-3


def how_many(released: Floats) -> Floats:
    return np.asarray(np.isfinite(released).sum(1), dtype=np.float64)


def sum_of_values(released: Floats) -> Floats:
    return np.asarray(np.nansum(released, axis=1))


def last_value(released: Floats) -> Floats:
    return np.where(np.isfinite(released[:, -1]), released[:, -1], np.inf)


@dataclass(frozen=True)
class Attack:
    """Two updates, entries in the order in which they are asked, and what to look at in the releases."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    statistic: Callable[[Floats], Floats]
    uploads: int
    epsilon: float = 1.0
    threshold: float = 0.0
    value_share: float = 0.5
    twin_runs: int = 3000

    def mechanism(self, variant: str) -> SparseVector:
        return SparseVector(
            self.epsilon,
            fraction=self.uploads / len(self.first),
            bound=BOUND,
            threshold=self.threshold,
            variant=variant,
            value_share=self.value_share,
        )

    def twin(self, variant: str, fault: str = "") -> Twin:
        return Twin(self.epsilon, self.uploads, BOUND, self.threshold, variant, self.value_share, fault=fault)


ATTACKS = {
    # One entry, far beyond the bound on either side.
    "sign": Attack((1.0,), (-1.0,), last_value, uploads=1),
    # As many of them as there are uploads, or many more.
    "signs": Attack((1.0,) * 64, (-1.0,) * 64, sum_of_values, uploads=64),
    "signs, one upload": Attack((1.0,) * 64, (-1.0,) * 64, sum_of_values, uploads=1),
    # All entries large, or none.
    "sizes": Attack((1.0,) * 1024, (0.0,) * 1024, how_many, uploads=1024),
    "sizes, one upload": Attack((1.0,) * 1024, (0.0,) * 1024, how_many, uploads=1),
    # A released value that shows the answer of its comparison shows that the threshold was lower still, and
    # so what the silence of the others before it means (Lyu, Su and Li, on their algorithm 3).
    "silence": Attack(
        (0.0,) * 8 + (BOUND,),
        (BOUND,) * 8 + (0.0,),
        last_value,
        uploads=1,
        epsilon=4.0,
        threshold=BOUND / 2,
        value_share=0.1,
        twin_runs=200_000,
    ),
}


def measured(attack: Attack, run: Callable[[Floats, int], Floats]) -> float:
    """Lower bound on epsilon; ``run(update, seed)`` gives released values (n, P), NaN where silent."""
    outputs = [run(np.array(update), seed) for seed, update in enumerate((attack.first, attack.second))]
    return epsilon_at_least(attack.statistic(outputs[0]), attack.statistic(outputs[1]))


def of_twin(attack: Attack, variant: str, fault: str = "") -> float:
    size = len(attack.first)

    def run(update: Floats, seed: int) -> Floats:
        thresholds = size if fault == "never stops" else attack.uploads
        draws = draw(np.random.default_rng(seed), attack.twin_runs, size, thresholds, variant)
        return attack.twin(variant, fault)(update, draws)

    return measured(attack, run)


@pytest.mark.parametrize("variant", ["paper", "standard"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_the_sparse_vector_mechanism_loses_no_more_than_it_claims(attack: Attack, variant: str) -> None:
    runs = 3000 if len(attack.first) < 100 else 1000

    def run(update: Floats, seed: int) -> Floats:
        release = attack.mechanism(variant).make_release(None, None, SeededNoise(seed, simulated=True))
        stream = torch.Generator().manual_seed(0)
        order = torch.randperm(len(update), generator=stream)
        delta = torch.empty(len(update))
        delta[order] = torch.from_numpy(update).float()
        outputs = np.full((runs, len(update)), np.nan)
        for output in outputs:
            released = release.release(delta, stream.manual_seed(0))
            output[released.indices.numpy()] = released.values.numpy()
        inverse = outputs[:, order.numpy()]
        return np.asarray(inverse)

    assert measured(attack, run) <= attack.epsilon
    assert of_twin(attack, variant) <= attack.epsilon


FAULTS = [
    ("values without noise", "sign", ["paper", "standard"]),
    ("noise before the bound", "sign", ["paper", "standard"]),
    ("counter ignored", "sizes", ["paper"]),
    ("counter ignored", "signs", ["standard"]),
    ("never stops", "sizes, one upload", ["paper"]),
    ("never stops", "signs, one upload", ["standard"]),
    ("noise of the comparison again", "silence", ["standard"]),
]


@pytest.mark.parametrize(
    ("fault", "attack", "variant"),
    [(fault, attack, variant) for fault, attack, variants in FAULTS for variant in variants],
)
def test_broken_sparse_vector_mechanisms_are_convicted(fault: str, attack: str, variant: str) -> None:
    assert of_twin(ATTACKS[attack], variant, fault) > ATTACKS[attack].epsilon


# --- participant level -------------------------------------------------------------------------------------

# Large for a delta, so that few runs come close to the truth.
EPSILON, DELTA = 2.0, 0.05


def participant_level_loses(mechanism: ParticipantLevel, selection: Selection | None) -> float:
    """Lower bound on epsilon from the first of four entries, which is far beyond the clip, or zero."""

    def first_values(update: float) -> Floats:
        release = mechanism.make_release(selection, None, SeededNoise(int(update), simulated=True))
        stream, delta = torch.Generator().manual_seed(0), torch.tensor([update, 0.0, 0.0, 0.0])
        outputs = np.full(2500, np.inf)
        for i in range(len(outputs)):
            released = release.release(delta, stream)
            if len(released.indices) and released.indices[0] == 0:
                outputs[i] = released.values[0]
        return outputs

    return epsilon_at_least(first_values(100.0), first_values(0.0), DELTA)


@pytest.mark.parametrize("selection", [None, LargestValues(0.5), RandomFraction(0.75)], ids=repr)
def test_participant_level_loses_no_more_than_it_claims(selection: Selection | None) -> None:
    target = ParticipantLevel(epsilon=EPSILON, delta=DELTA, clip=0.5)
    mechanism = target.calibrated(Plan(size=4, rounds=1))
    assert 0.0 < participant_level_loses(mechanism, selection) <= EPSILON
    # The control: with a third of the noise the claim is false, and is seen to be.
    weaker = replace(mechanism, noise_multiplier=mechanism.event(Plan(size=4)).noise_multiplier / 3)
    assert participant_level_loses(weaker, selection) > EPSILON
