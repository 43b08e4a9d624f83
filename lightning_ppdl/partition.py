"""Who holds which training rows: three ways to deal one data set out to the participants.

Every partition gives each participant the same number of rows, and no row to two of them.
With ``samples=None`` that number is the largest possible, n // participants, and the remainder is
held by nobody. In the paper's evaluation each holds 1% of the training set, which
is ``IID(samples=600)`` for MNIST.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.randomness import numpy_generator
from lightning_ppdl.validation import require_count, require_positive

#: Row numbers, or labels: one-dimensional.
IntArray: TypeAlias = npt.NDArray[np.int64]


class Partition(Protocol):
    """Anything with ``split()``: write one to deal the data out differently."""

    def split(self, labels: IntArray, participants: int, seed: int) -> list[IntArray]:
        """Each participant's row numbers: disjoint, ascending, and fixed by the seed.

        Args:
            labels: (n,), the training labels.
            participants: N, at least 1.
            seed: Of all draws.

        Raises:
            ConfigurationError: If there are too few rows, or an argument is out of range.
        """
        ...


def held_by_nobody(shares: Sequence[IntArray], rows: int) -> IntArray:
    """The row numbers that no participant holds, ascending.

    Settings may be chosen on these rows, if they are declared public, without a look at anybody's data
    or at the test set.

    Args:
        shares: What a partition returned.
        rows: n, the number of training rows.

    >>> held_by_nobody([np.array([1, 4]), np.array([0, 2])], rows=6).tolist()
    [3, 5]
    """
    return np.setdiff1d(np.arange(rows), np.concatenate(shares))


@dataclass(frozen=True)
class IID:
    """Rows drawn evenly at random, so that every share looks like the whole, as in the paper.

    Args:
        samples: Rows for each participant; None shares all of them equally.
    """

    samples: int | None = None

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    def split(self, labels: IntArray, participants: int, seed: int) -> list[IntArray]:
        """See :meth:`Partition.split`."""
        each = _rows_each(self.samples, labels, participants)
        order = numpy_generator(seed, "partition").permutation(len(labels))
        return [np.sort(share) for share in order[: participants * each].reshape(-1, each)]


@dataclass(frozen=True)
class Dirichlet:
    """Each participant draws class shares q ~ Dir(alpha * p), p being the classes' shares overall.

    A large alpha approaches :class:`IID`; a small one leaves each participant with a single class.
    A class that runs out is left out, and its share of the draw goes to the others in proportion;
    participants late in the list therefore see more of what is left, the more so the larger the
    part of the data set that is dealt out.

    Source: T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification", 2019.

    Args:
        samples: Rows for each participant; None shares all of them equally.
        alpha: Concentration, above 0.
    """

    samples: int | None = None
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_samples(self.samples)
        require_positive("partition.alpha", self.alpha)

    def split(self, labels: IntArray, participants: int, seed: int) -> list[IntArray]:
        """See :meth:`Partition.split`."""
        each = _rows_each(self.samples, labels, participants)
        draw = numpy_generator(seed, "partition")
        classes, counts = np.unique(labels, return_counts=True)
        pools = [draw.permutation(np.flatnonzero(labels == label)) for label in classes]
        prior = counts / counts.sum()
        used = np.zeros_like(counts)
        shares = []
        for _ in range(participants):
            wanted = draw.dirichlet(self.alpha * prior)
            taken = _draw_counts(draw, each, wanted, counts - used)
            chosen = [
                pool[start : start + amount] for pool, start, amount in zip(pools, used, taken, strict=True)
            ]
            shares.append(np.sort(np.concatenate(chosen)))
            used += taken
        return shares


@dataclass(frozen=True)
class Shards:
    """Rows sorted by label and cut into equal shards, a few of which go to each participant.

    With 2 shards, most participants see two classes only.

    Source: B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, section 3 ("pathological non-IID": 200 shards of 300
    images of MNIST, 2 for each of 100 clients).

    Args:
        samples: Rows for each participant, a multiple of `shards`; None shares all equally.
        shards: Shards for each participant, at least 1.
    """

    samples: int | None = None
    shards: int = 2

    def __post_init__(self) -> None:
        _check_samples(self.samples)
        require_count("partition.shards", self.shards)
        if self.samples is not None and self.samples % self.shards:
            raise ConfigurationError(
                f"partition.samples={self.samples} is not a multiple of "
                f"partition.shards={self.shards}; "
                f"take {-(-self.samples // self.shards) * self.shards}"
            )

    def split(self, labels: IntArray, participants: int, seed: int) -> list[IntArray]:
        """See :meth:`Partition.split`."""
        size = _rows_each(self.samples, labels, participants) // self.shards
        if size == 0:
            raise ConfigurationError(
                f"partition.shards={self.shards} for each of {participants} participants is more "
                f"than the {len(labels)} training rows; take fewer"
            )
        draw = numpy_generator(seed, "partition")
        shuffled = draw.permutation(len(labels))  # so that a shard is a random part of its class
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        available = len(labels) // size
        chosen = draw.permutation(available)[: participants * self.shards]
        rows = by_label[: available * size].reshape(available, size)[chosen]
        return [np.sort(share) for share in rows.reshape(participants, -1)]


def _draw_counts(
    draw: np.random.Generator, rows: int, wanted: npt.NDArray[np.float64], left: IntArray
) -> IntArray:
    """How many of `rows` to take from each class: multinomial, but never more than are left.

    Each pass either finishes or uses up a class, so there are at most as many passes as classes.
    """
    taken = np.zeros_like(left)
    while (missing := rows - taken.sum()) > 0:
        weights = np.where(taken < left, wanted, 0.0)
        if not weights.sum() > 0:  # every class that was wanted is used up: take what there is
            weights = (left - taken).astype(np.float64)
        more = draw.multinomial(missing, weights / weights.sum())
        taken += np.minimum(more, left - taken)
    return taken


def _check_samples(samples: int | None) -> None:
    if samples is not None:
        require_count("partition.samples", samples)


def _rows_each(samples: int | None, labels: IntArray, participants: int) -> int:
    """The number of rows for each participant, once the arguments of `split` are seen to fit."""
    require_count("participants", participants)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigurationError(
            f"labels has dtype {labels.dtype} and shape {labels.shape}; give one whole number a row"
        )
    each = len(labels) // participants if samples is None else samples
    if each == 0 or participants * each > len(labels):
        raise ConfigurationError(
            f"{participants} participants with partition.samples={samples} need "
            f"{participants * max(each, 1)} training rows and there are {len(labels)}; "
            "lower partition.samples or the number of participants"
        )
    return each
