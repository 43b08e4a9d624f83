"""Per-example gradients of one parameter, held in whatever form is cheapest.

What clipping needs of them is little: the norm of each, and one weighted sum. Where a gradient is a sum
of outer products, both follow from the factors without forming it (Goodfellow, "Efficient Per-Example
Gradient Computations", 2015; for sequences Li et al., "Large Language Models Can Be Strong
Differentially Private Learners", ICLR 2022, section 4, the ghost norm; the weighted sum from the factors
is Bu et al., "Differentially Private Optimization on Large Model at Small Cost", ICML 2023, book-keeping).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Products of sums of float32 cancel: the squared norm is off by about this share of the sum of
# magnitudes. It is added, so that no gradient is taken for smaller than it is.
_ROUNDING = 16 * torch.finfo(torch.float32).eps


class PerExample(ABC):
    """The gradients of one parameter, one for each of b examples."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """(b,): the squared L2 norm of each gradient."""

    @abstractmethod
    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        """Add the sum of the gradients, each times its weight.

        Args:
            total: (numel,), changed in place.
            weights: (b,).
        """

    @abstractmethod
    def materialised(self) -> Tensor:
        """(b, numel): the gradients themselves."""

    @abstractmethod
    def without(self, bad: Tensor) -> PerExample:
        """The same, with zero for the examples where ``bad``, bool (b,), is true."""


@dataclass(frozen=True, eq=False)
class Dense(PerExample):
    """Gradients as they are.

    Args:
        values: (b, numel).
    """

    values: Tensor

    def squared_norms(self) -> Tensor:
        return _lengths(self.values).square_()

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        total.addmv_(self.values.t(), weights)

    def materialised(self) -> Tensor:
        return self.values

    def without(self, bad: Tensor) -> Dense:
        return Dense(self.values.masked_fill(bad[:, None], 0.0))


@dataclass(frozen=True, eq=False)
class Outer(PerExample):
    """Gradients of a weight: for each example and group, the sum over t of backprops[t] inputs[t]^T.

    Args:
        inputs: (b, groups, t, p).
        backprops: (b, groups, t, q).
    """

    inputs: Tensor
    backprops: Tensor

    def squared_norms(self) -> Tensor:
        positions, p, q = self.inputs.shape[2], self.inputs.shape[3], self.backprops.shape[3]
        if positions == 1:
            squares = _lengths(self.inputs).mul_(_lengths(self.backprops)).square_()
            return squares.flatten() if squares.shape[1] == 1 else squares.sum((1, 2))
        if 2 * positions * positions > p * q:
            return Dense(self._formed).squared_norms()
        lengths = _lengths(self.inputs) * _lengths(self.backprops)
        gram = (self.inputs @ self.inputs.mT).mul_(self.backprops @ self.backprops.mT)
        error = lengths.sum(2).square_().sum(1)
        return gram.sum((1, 2, 3)).clamp_(min=0.0).add_(error, alpha=_ROUNDING)

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        if "_formed" in self.__dict__:
            return Dense(self._formed).add_weighted_sum(total, weights)
        groups, p, q = self.inputs.shape[1], self.inputs.shape[3], self.backprops.shape[3]
        weighted = self.backprops * weights[:, None, None, None]
        if groups == 1:
            total.view(q, p).addmm_(weighted.reshape(-1, q).t(), self.inputs.reshape(-1, p))
        else:
            a = self.inputs.transpose(0, 1).reshape(groups, -1, p)
            g = weighted.transpose(0, 1).reshape(groups, -1, q)
            total.view(groups, q, p).baddbmm_(g.mT, a)
        return None

    def materialised(self) -> Tensor:
        formed: Tensor = self._formed
        return formed

    @cached_property
    def _formed(self) -> Tensor:
        return (self.backprops.mT @ self.inputs).flatten(1)

    def without(self, bad: Tensor) -> Outer:
        where = bad[:, None, None, None]
        return Outer(self.inputs.masked_fill(where, 0.0), self.backprops.masked_fill(where, 0.0))


@dataclass(frozen=True, eq=False)
class Lookup(PerExample):
    """Gradients of an embedding: of example n, backprops[n, t] added to row indices[n, t], for every t.

    Args:
        indices: int64 (b, t).
        backprops: (b, t, width).
        rows: Number of rows of the embedding.
    """

    indices: Tensor
    backprops: Tensor
    rows: int

    def squared_norms(self) -> Tensor:
        same = self.indices[:, :, None] == self.indices[:, None, :]
        gram = (self.backprops @ self.backprops.mT).mul_(same)
        error = _lengths(self.backprops).sum(1).square_()
        return gram.sum((1, 2)).clamp_(min=0.0).add_(error, alpha=_ROUNDING)

    def add_weighted_sum(self, total: Tensor, weights: Tensor) -> None:
        weighted = (self.backprops * weights[:, None, None]).flatten(0, 1)
        total.view(self.rows, -1).index_add_(0, self.indices.flatten(), weighted)

    def materialised(self) -> Tensor:
        examples, _, width = self.backprops.shape
        formed = self.backprops.new_zeros(examples, self.rows, width)
        formed.scatter_add_(1, self.indices[:, :, None].expand(-1, -1, width), self.backprops)
        return formed.flatten(1)

    def without(self, bad: Tensor) -> Lookup:
        return Lookup(self.indices, self.backprops.masked_fill(bad[:, None, None], 0.0), self.rows)


def _lengths(vectors: Tensor) -> Tensor:
    """The L2 norms along the last axis."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def total_over_uses(uses: Sequence[PerExample]) -> PerExample:
    """One parameter's gradients over all its uses in a forward: summed *before* any norm is taken.

    Clipping each use by itself would let a record move the sum by the clip for every use.
    """
    if len(uses) == 1:
        return uses[0]
    outers = [use for use in uses if isinstance(use, Outer)]
    if len(outers) == len(uses) and len({use.inputs.shape[1] for use in outers}) == 1:
        return Outer(
            torch.cat([use.inputs for use in outers], dim=2),
            torch.cat([use.backprops for use in outers], dim=2),
        )
    lookups = [use for use in uses if isinstance(use, Lookup)]
    if len(lookups) == len(uses):
        return Lookup(
            torch.cat([use.indices for use in lookups], dim=1),
            torch.cat([use.backprops for use in lookups], dim=1),
            lookups[0].rows,
        )
    return Dense(torch.stack([use.materialised() for use in uses]).sum(0))
