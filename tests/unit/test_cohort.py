"""The mean of updates, quorums, and cycles under any order of events; see also ``backend_synchronous.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.errors import ConfigurationError, JoinRefusedError, TurnNotHeldError
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.records import Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.selection import LargestValues
from lightning_ppdl.server.admission import Terms
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.mean import Mean
from lightning_ppdl.server.merge import Add, MergeContext, MergeRule, ServerOptimizer
from lightning_ppdl.server.protocol import Synchronous

SIZE = 6
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)
UPDATES = st.lists(st.dictionaries(st.integers(0, SIZE - 1), NUMBERS), min_size=1, max_size=7)


def sparse(entries: dict[int, float]) -> SparseUpdate:
    indices = np.array(sorted(entries), np.int64)
    return SparseUpdate("anna", 1, 3, indices, np.array([entries[i] for i in sorted(entries)], np.float32))


@given(UPDATES)
def test_the_mean_counts_zeros_where_an_update_has_no_entry(updates: list[dict[int, float]]) -> None:
    mean = Mean(SIZE)
    for entries in updates:
        mean.add(sparse(entries))
    got = mean.take(cycle=4)
    uploaded = sorted({index for entries in updates for index in entries})
    expected = [np.float32(sum(e.get(i, 0.0) for e in updates) / len(updates)) for i in uploaded]
    assert got.indices.tolist() == uploaded and got.indices.dtype == np.int64
    np.testing.assert_array_equal(got.values, np.array(expected, np.float32))
    assert got.values.dtype == np.float32 and (got.round, got.base_version) == (4, 3)


@given(UPDATES, UPDATES)
def test_a_mean_knows_nothing_of_the_one_before(
    before: list[dict[int, float]], updates: list[dict[int, float]]
) -> None:
    used, fresh = Mean(SIZE), Mean(SIZE)
    for entries in before:
        used.add(sparse(entries))
    used.take(cycle=1)
    for mean in (used, fresh):
        for entries in updates:
            mean.add(sparse(entries))
    mine, theirs = used.take(cycle=2), fresh.take(cycle=2)
    np.testing.assert_array_equal(mine.indices, theirs.indices)
    np.testing.assert_array_equal(mine.values, theirs.values)


def test_the_mean_of_one_is_that_one() -> None:
    mean, update = Mean(SIZE), sparse({0: 0.1, 5: -3e-45})
    mean.add(update)
    got = mean.take(cycle=1)
    np.testing.assert_array_equal(got.indices, update.indices)
    np.testing.assert_array_equal(got.values, update.values)


def test_the_order_of_large_and_small_does_not_show() -> None:
    values = [1e8, 1.0, -1e8, 1.0]
    means = []
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
        mean = Mean(SIZE)
        for place in order:
            mean.add(sparse({2: values[place]}))
        means.append(mean.take(cycle=1).values.tolist())
    assert means == [[0.5]] * 3


def test_how_many_uploads_a_quorum_is() -> None:
    # 0.29 * 100 is 28.999999999999996, 0.07 * 100 is 7.000000000000001.
    assert [Synchronous(quorum=q).required(100) for q in (0.29, 0.07, 0.075, 1.0)] == [29, 7, 8, 100]
    assert [Synchronous(quorum=q).required(3) for q in (0.5, 1.0, 1, 3)] == [2, 3, 1, 3]
    assert Synchronous().required(50) == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quorum": 0}, "quorum=0"),
        ({"quorum": -2}, "quorum=-2"),
        ({"quorum": 1.5}, "quorum=1.5"),
        ({"quorum": float("nan")}, "quorum=nan"),
        ({"quorum": True}, "quorum=True"),
        ({"quorum": "all"}, "quorum='all'"),
        ({"deadline_seconds": 0}, "deadline_seconds=0"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds=inf"),
        ({"min_members": 0}, "min_members=0"),
        ({"min_members": 1.5}, "min_members=1.5"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Synchronous(**settings)
    assert named in str(raised.value)


def test_a_quorum_that_the_members_cannot_reach_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="quorum=3 cannot be reached by 2 members"):
        ParameterServer(protocol=Synchronous(quorum=3), members=["anna", "ben"])
    ParameterServer(protocol=Synchronous(quorum=2), members=["anna", "ben"])


def test_the_default_is_fedavg() -> None:
    assert Synchronous().default_merge() == Add()


FEATURES = 5
SPEC = Manifest((ParameterSpec("w", (FEATURES,), "float32"),), "gradient")


def gradient(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean over rows of (x w - y)^2 / 2."""
    return x.T @ (x @ w - y) / len(x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedsgd_is_sgd_on_the_pooled_data(momentum: float) -> None:
    """Fraction 1, gradients, one step a round: participants of equal size together make one large batch."""
    stream = torch.Generator().manual_seed(7)
    x, y = torch.randn(60, FEATURES, generator=stream), torch.randn(60, generator=stream)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=momentum)
    server = ParameterServer(
        protocol=Synchronous(), merge=ServerOptimizer(sgd), initial=np.zeros(FEATURES, np.float32)
    )
    release = PlainRelease(LargestValues(1.0))
    members = [
        Participant(name, MemoryBackend("memory://given", server), SPEC, release)
        for name in ("anna", "ben", "cleo")
    ]
    for member in members:
        member.join()
    local = [torch.zeros(FEATURES)] * 3
    central = torch.nn.Parameter(torch.zeros(FEATURES))
    optimizer = sgd([central])
    for _ in range(25):
        starts = [member.begin_round(at) for member, at in zip(members, local)]
        local = [start for start in starts if start is not None]
        for member, start, rows in zip(members, local, torch.arange(60).chunk(3)):
            member.gradients.add_(gradient(start, x[rows], y[rows]))
            assert member.end_round(start).merged
        central.grad = gradient(central.detach(), x, y)
        optimizer.step()
    assert server.version == 25
    np.testing.assert_allclose(server.parameters(), central.detach(), rtol=1e-5, atol=1e-6)
    assert np.abs(server.parameters()).max() > 0.1


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (None, r"values of magnitude 0\.5 at most.*promises no bound: give bound=0\.5.*truncate"),
        (0.6, r"bound=0\.6 is not within what 'home' agrees to, 0 to 0\.5; give bound=0\.5"),
    ],
)
def test_a_bound_that_is_not_kept_or_not_promised_is_refused_with_a_remedy(
    bound: float | None, message: str
) -> None:
    rule: MergeRule = Add()
    manifest = Manifest(SPEC.parameters, bound=bound)
    with pytest.raises(JoinRefusedError, match=message):
        Terms(bound=0.5).check_join("anna", manifest, rule, (), "home")
    Terms().check_join("anna", manifest, rule, (), "home")


LEASE, DEADLINE = 10.0, 7.0


class AnyoneAnytime(RuleBasedStateMachine):
    """Participants come, upload, die and leave in any order. Nothing is lost, and the living are served.

    Every upload is 1, so a mean that is merged is 1 however many are in it.
    """

    names = st.sampled_from("abcde")

    def __init__(self, protocol: Synchronous | None = None) -> None:
        super().__init__()
        self.now = 100.0
        protocol = protocol or Synchronous(min_members=1)
        self.turns = protocol.make_turns("ab", LEASE, lambda: self.now)
        self.present: set[str] = set()
        self.collected = self.version = 0

    def settle(self) -> None:
        """What the server does around every request."""
        while (update := self.turns.due()) is not None:
            assert update.values.tolist() == [1.0] and update.base_version == self.version
            assert self.collected > 0, "something was merged twice"
            self.version += 1
            self.collected = 0

    def upload(self, name: str) -> bool:
        try:
            self.turns.renew(name)
        except TurnNotHeldError:
            return False
        update = SparseUpdate(name, 1, self.version, np.array([2]), np.ones(1, np.float32))
        self.turns.collect(update, MergeContext(0, "change", np.zeros(SIZE, np.float32)))
        self.turns.end(name)
        self.collected += 1
        self.settle()
        return True

    @rule(name=names)
    def join(self, name: str) -> None:
        self.turns.enter(name)
        self.present.add(name)

    @rule(name=names)
    def leave(self, name: str) -> None:
        self.turns.leave(name)
        self.present.discard(name)
        self.settle()
        assert self.present or not self.collected, "the last one left, and its upload stayed behind"

    @rule(name=names)
    def start(self, name: str) -> None:
        if name in self.present and self.turns.take(name):
            assert name in self.turns.awaited

    @rule(name=names)
    def finish(self, name: str) -> None:
        awaited = name in self.turns.awaited
        assert not self.upload(name) or awaited

    @rule(name=names)
    def give_up(self, name: str) -> None:
        self.turns.end(name)
        self.settle()

    @rule(seconds=st.sampled_from([1.0, 6.0, LEASE + 1]))
    def wait(self, seconds: float) -> None:
        expected = self.turns.expires_at
        before = self.turns.awaited
        self.now += seconds
        self.settle()
        assert self.now >= expected or self.turns.awaited == before

    @invariant()
    def uploads_wait_only_while_somebody_is_awaited(self) -> None:
        assert self.turns.awaited or not self.collected

    @rule()
    def nobody_starves(self) -> None:
        """From any state: if all present work, a second a round, each is served, and as often."""
        served = dict.fromkeys(self.present, 0)
        for _ in range(int(3 * LEASE) + 20):
            holders = [name for name in sorted(self.present) if self.turns.take(name)]
            self.now += 1.0
            self.settle()
            for name in holders:
                served[name] += self.upload(name)
        assert all(count >= 10 for count in served.values())


class AnyoneAnytimeWithDeadlines(AnyoneAnytime):
    def __init__(self) -> None:
        super().__init__(Synchronous(deadline_seconds=DEADLINE, min_members=1))


quick = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyoneAnytime = AnyoneAnytime.TestCase
TestAnyoneAnytime.settings = quick
TestAnyoneAnytimeWithDeadlines = AnyoneAnytimeWithDeadlines.TestCase
TestAnyoneAnytimeWithDeadlines.settings = quick
