"""Merge rules: what an upload does to the shared vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import Quantity, SparseUpdate, Vector
from lightning_ppdl.server.history import History
from lightning_ppdl.server.store import Change
from lightning_ppdl.validation import require_not_negative

#: What a merge rule keeps, as numpy arrays by name.
MergeState: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class MergeContext:
    """What a merge rule may know besides the upload itself.

    Args:
        staleness: Updates merged since the version that the upload is based on.
        quantity: What the upload holds: parameters' changes or gradients.
        parameters: float32 (P,): the shared vector now. Read-only.
    """

    staleness: int
    quantity: Quantity
    parameters: Vector


class MergeRule(ABC):
    """Turns an accepted upload into a change of the shared vector.

    A rule may keep state of the size of the vector, never of the number of participants; one that
    keeps state belongs to one server.
    """

    quantities: frozenset[Quantity] = frozenset({"change"})
    """What this rule can merge."""

    @abstractmethod
    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        """What to add to the shared vector for an accepted ``update``."""

    def state(self) -> MergeState:
        """All that the rule has kept; a rule that keeps nothing need not say so. Not copied: use it up before
        the next merge."""
        return {}

    def restore(self, state: MergeState) -> None:  # noqa: B027 - most rules keep nothing
        """Go on from :meth:`state`, in another process: the same merges have the same results."""

    def describe(self) -> dict[str, Any]:
        """What decides what merges do, besides :meth:`state`: strings, numbers, lists and dicts.

        A restart with anything else is refused, for merges that are done again must do what they did. A
        dataclass is described by its fields; another rule that has settings has to say them.
        """
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        return {"kind": type(self).__name__, **_plain({name: getattr(self, name) for name in names})}


@dataclass(frozen=True)
class Add(MergeRule):
    """The paper's rule: ``w_j += v`` for every uploaded pair (section 5.2).

    Right where participants take turns. Under the asynchronous protocol with long rounds it diverges:
    many full steps from the same place add up.
    """

    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        return Change(update.indices, update.values)


@dataclass(frozen=True)
class StalenessWeighted(MergeRule):
    """``w_j += v / (1 + staleness) ** exponent``: an update counts less the more others it missed.

    Args:
        exponent: 0 is :class:`Add`; 1 makes n participants of equal speed an average.

    Source: C. Xie, S. Koyejo, I. Gupta, "Asynchronous Federated Optimization" (2019), section 4
    (the polynomial weight).
    """

    exponent: float = 1.0

    def __post_init__(self) -> None:
        require_not_negative("exponent", self.exponent)

    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        weight = np.float32((1 + context.staleness) ** -self.exponent)
        return Change(update.indices, update.values * weight)


_PAST = "past."


class Remainder(MergeRule):
    """What an update asks for, less what the others have done towards it since it was based.

    Participants of an asynchronous collaboration start from the same place and find the same
    directions: added up, their updates go many times too far, and averaged, not far enough. So, entry
    by entry, for an uploaded v with staleness s:

    1. Of ``reach * |v|`` only that part is applied by which the entry has not yet moved in v's
       direction since the update's base version.
    2. The reach is ``1 / (1 - p)``, at most ``sqrt(1 + s)``, where p in [-1, 1] is how steadily
       uploads of this entry have agreed with the direction in which it moved before their base: the
       sum of a geometric series of such steps.
    3. The result is divided by ``sqrt(1 + s)``, so that no entry moves further than its upload says.

    With no staleness it is :class:`Add`. It keeps P numbers and the vector's thinned past, O(log s)
    copies of it; for vectors that fill the memory take :class:`StalenessWeighted`, which keeps nothing.
    benchmarks/asynchronous.py compares them.
    """

    def __init__(self) -> None:
        self._history = History()
        self._persistence: Vector | None = None
        self._stalest = 1

    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        staleness, indices = context.staleness, update.indices
        self._stalest = max(self._stalest, staleness)
        version = update.base_version + staleness
        self._history.record(version, context.parameters, horizon=2 * self._stalest)
        if self._persistence is None:
            self._persistence = np.zeros_like(context.parameters)
        if staleness == 0:
            return Change(indices, update.values)
        base = self._history.at(update.base_version, indices)
        earlier = self._history.at(max(0, update.base_version - staleness), indices)
        direction = np.sign(update.values)
        agreement = direction * np.sign(base - earlier)
        persistence = self._persistence[indices]
        persistence += np.where(agreement != 0, agreement - persistence, 0) / np.float32(1 + staleness)
        self._persistence[indices] = persistence
        root = np.sqrt(np.float32(1 + staleness))
        reach = 1 / np.maximum(1 - persistence, 1 / root)
        done = np.maximum(direction * (context.parameters[indices] - base), 0)
        remainder = np.maximum(reach * np.abs(update.values) - done, 0)
        return Change(indices, direction * remainder / root)

    def state(self) -> MergeState:
        if self._persistence is None:
            return {}
        past = {f"{_PAST}{version}": copy for version, copy in self._history.state().items()}
        return {"persistence": self._persistence, "stalest": np.array(self._stalest), **past}

    def restore(self, state: MergeState) -> None:
        if not state:
            return
        self._persistence = np.array(state["persistence"])
        self._stalest = int(state["stalest"])
        self._history.restore({k.removeprefix(_PAST): v for k, v in state.items() if k.startswith(_PAST)})


_INNER = "rule."


class ServerMomentum(MergeRule):
    """Heavy-ball momentum over what another rule makes of the uploads: ``m = momentum * m + change``.

    Args:
        momentum: In [0, 1); 0 is the rule itself.
        rule: What the momentum is taken of.

    Source: T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution
    for Federated Visual Classification" (2019), FedAvgM.
    """

    def __init__(self, momentum: float = 0.9, rule: MergeRule | None = None) -> None:
        require_not_negative("momentum", momentum)
        if momentum >= 1:
            raise ConfigurationError(f"momentum={momentum!r} must be below 1, e.g. momentum=0.9")
        self._setting = float(momentum)
        self._momentum = np.float32(momentum)
        self._rule = Add() if rule is None else rule
        if not isinstance(self._rule, MergeRule):
            raise ConfigurationError(
                f"rule={rule!r} must be a MergeRule object, e.g. rule=StalenessWeighted()"
            )
        self._velocity: Vector | None = None

    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        change = self._rule.merge(update, context)
        if self._velocity is None:
            self._velocity = np.zeros_like(context.parameters)
        self._velocity *= self._momentum
        self._velocity[slice(None) if change.indices is None else change.indices] += change.values
        return Change(None, self._velocity)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "momentum": self._setting, "rule": self._rule.describe()}

    def state(self) -> MergeState:
        inner = {f"{_INNER}{name}": array for name, array in self._rule.state().items()}
        own = {} if self._velocity is None else {"velocity": self._velocity}
        return {**own, **inner}

    def restore(self, state: MergeState) -> None:
        self._velocity = np.array(state["velocity"]) if "velocity" in state else None
        self._rule.restore({k.removeprefix(_INNER): v for k, v in state.items() if k.startswith(_INNER)})


_KEPT = "optimizer."


class ServerOptimizer(MergeRule):
    """A torch optimizer at the server, stepped once an upload.

    Gradients are applied as they are. A change of the parameters is a descent direction: its negative
    is the gradient (the pseudo-gradient of S. Reddi et al., "Adaptive Federated Optimization", ICLR
    2021). Entries that were not uploaded have gradient zero.

    Args:
        optimizer: Makes the optimizer, e.g. ``functools.partial(torch.optim.SGD, lr=0.05)``.
    """

    quantities = frozenset({"change", "gradient"})

    def __init__(self, optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]) -> None:
        self._make = optimizer
        self._parameter: torch.nn.Parameter | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def merge(self, update: SparseUpdate, context: MergeContext) -> Change:
        if self._parameter is None or self._optimizer is None:
            self._parameter, self._optimizer = self._begin(len(context.parameters))
        gradient = self._parameter.grad
        assert gradient is not None
        gradient.zero_()
        sign = 1 if context.quantity == "gradient" else -1
        gradient[torch.from_numpy(update.indices)] = sign * torch.from_numpy(update.values)
        with torch.no_grad():
            self._parameter.copy_(torch.from_numpy(context.parameters))
        self._optimizer.step()
        return Change(None, self._parameter.detach().numpy() - context.parameters)

    def describe(self) -> dict[str, Any]:
        optimizer = self._begin(1)[1]
        settings = _plain(optimizer.defaults)
        return {**super().describe(), "optimizer": {"kind": type(optimizer).__name__, **settings}}

    def state(self) -> MergeState:
        if self._parameter is None or self._optimizer is None:
            return {}
        # Tensors and numbers (a step count) alike; groups and their settings come from the optimizer's maker.
        kept = self._optimizer.state[self._parameter]
        arrays = {name: np.asarray(value) for name, value in kept.items() if value is not None}
        return {"size": np.array(self._parameter.numel()), **{f"{_KEPT}{k}": v for k, v in arrays.items()}}

    def restore(self, state: MergeState) -> None:
        if not state:
            return
        self._parameter, self._optimizer = self._begin(int(state["size"]))
        kept = {k.removeprefix(_KEPT): torch.tensor(v) for k, v in state.items() if k.startswith(_KEPT)}
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": {0: kept} if kept else {}})

    def _begin(self, size: int) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.empty(size))
        parameter.grad = torch.empty_like(parameter)
        return parameter, self._make([parameter])


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str | tuple | None)}
