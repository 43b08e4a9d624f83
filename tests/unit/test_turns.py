"""Turns: their order, leases, and that nobody waits for ever."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_ppdl.errors import TurnNotHeldError
from lightning_ppdl.server.protocol import RandomOrder, RoundRobin, TurnTaking
from lightning_ppdl.server.queue import Queue

LEASE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """Turns on a clock that the test moves."""

    def __init__(self, members: str = "", protocol: TurnTaking | None = None) -> None:
        self.clock = Clock()
        self.turns = Queue((protocol or RoundRobin()).order, list(members), LEASE, self.clock)

    def holders(self, *names: str) -> list[str]:
        return [name for name in names if self.turns.take(name)]

    def renews(self, name: str) -> bool:
        try:
            self.turns.renew(name)
        except TurnNotHeldError:
            return False
        return True

    def play(self, names: str, count: int) -> str:
        """``count`` turns, each taken and ended by whoever gets it; everyone asks all the time."""
        order = ""
        while len(order) < count:
            (holder,) = self.holders(*names)
            order += holder
            self.turns.end(holder)
        return order


def test_round_robin_keeps_the_order_of_the_members() -> None:
    assert Table("abc").play("cba", 9) == "abcabcabc"


def test_without_members_the_order_is_that_of_joining() -> None:
    table = Table()
    for name in "cab":
        table.turns.enter(name)
    assert table.play("abc", 9) == "cabcabcab"


def test_random_order_is_a_new_permutation_each_cycle() -> None:
    order = Table("abcde", RandomOrder(seed=1)).play("abcde", 100)
    cycles = [order[i : i + 5] for i in range(0, 100, 5)]
    assert all(sorted(cycle) == list("abcde") for cycle in cycles)
    assert len(set(cycles)) > 10
    assert order == Table("abcde", RandomOrder(seed=1)).play("abcde", 100)
    assert order != Table("abcde", RandomOrder(seed=2)).play("abcde", 100)
    assert {cycle[0] for cycle in cycles} == set("abcde")


def test_a_late_joiner_comes_at_the_end_of_the_cycle() -> None:
    table = Table("abc")
    assert table.play("abc", 1) == "a"
    table.turns.enter("d")
    assert table.play("abcd", 7) == "bcdabcd"


def test_ending_a_turn_one_does_not_have_changes_nothing() -> None:
    table = Table("ab")
    assert table.holders("a") == ["a"]
    table.turns.end("b")
    table.turns.end("stranger")
    assert table.holders("a", "b") == ["a"]


def test_taking_again_and_renewing_prolong_the_lease() -> None:
    table = Table("ab")
    assert table.turns.take("a")
    for keep in (table.turns.take, table.renews):
        for _ in range(3):
            table.clock.now += LEASE
            assert keep("a")
    table.clock.now += LEASE + 0.1
    assert not table.renews("a")
    assert table.holders("b") == ["b"]


def test_renewing_needs_a_turn_that_was_taken() -> None:
    table = Table("ab")
    table.play("ab", 1)
    # It is offered to b, who has not taken it.
    assert table.turns.current == "b"
    assert not table.renews("b")
    assert not table.renews("a")


def test_a_lost_turn_passes_on_and_its_holder_comes_back_later(caplog: pytest.LogCaptureFixture) -> None:
    table = Table("abc")
    assert table.holders("a") == ["a"]
    table.clock.now += LEASE + 1
    with caplog.at_level(logging.WARNING):
        assert table.holders("b") == ["b"]
    assert "'a' gave no sign of life for 10 seconds and lost its turn" in caplog.text
    # a asks again: it comes after the others of this cycle, and then in its old place.
    assert not table.turns.take("a")
    table.turns.end("b")
    assert table.play("abc", 5) == "caabc"


def test_silent_members_are_skipped_named_and_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    table = Table("abcd")
    with caplog.at_level(logging.WARNING):
        order = ""
        for _ in range(400):
            for holder in table.holders("a", "d"):
                order += holder
                table.turns.end(holder)
            table.clock.now += 1.0
    assert order.startswith("adadadad")
    assert Counter(order)["a"] - Counter(order)["d"] in (0, 1)
    # Named once each, not every cycle; the others do not pay the lease again.
    assert caplog.text.count("did not take its turn") == 2
    assert "'b' did not take its turn" in caplog.text and "'c' did not take its turn" in caplog.text
    assert len(order) > 350


def test_a_silent_member_comes_back_to_its_place() -> None:
    table = Table("abc")
    assert table.play("a", 1) == "a"
    table.clock.now += LEASE + 1
    assert table.holders("c") == ["c"]
    table.turns.enter("b")
    assert not table.turns.take("b")
    table.turns.end("c")
    assert table.play("abc", 7) == "babcabc"


def test_leaving_passes_the_turn_and_the_place() -> None:
    table = Table("abc")
    assert table.holders("a") == ["a"]
    table.turns.leave("a")
    assert table.holders("b", "c") == ["b"]
    table.turns.leave("c")
    table.turns.leave("stranger")
    assert table.play("b", 3) == "bbb"
    table.turns.leave("b")
    assert table.turns.current is None


def test_alone_and_late_one_gets_the_turn_back() -> None:
    table = Table("a")
    assert table.holders("a") == ["a"]
    table.clock.now += 100 * LEASE
    assert not table.renews("a")
    assert any(table.turns.take("a") for _ in range(2))


class AnyoneAnytime(RuleBasedStateMachine):
    """Participants come, work, die and leave in any order. Whatever they did, the living are served."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table("abc")
        self.present: set[str] = set()
        self.holder: str | None = None
        self.until = 0.0

    names = st.sampled_from("abcdef")

    @rule(name=names)
    def join(self, name: str) -> None:
        self.table.turns.enter(name)
        self.present.add(name)
        if name == self.holder:  # perhaps another process: the turn is still its own, and must be taken again
            self.holder = None

    @rule(name=names)
    def leave(self, name: str) -> None:
        self.table.turns.leave(name)
        self.present.discard(name)
        if name == self.holder:
            self.holder = None

    @rule(name=names)
    def take(self, name: str) -> None:
        if name not in self.present:
            return
        if self.table.turns.take(name):
            # The only way to a turn that another holds is the end of its lease.
            assert self.holder in (None, name) or self.table.clock.now > self.until
            self.holder, self.until = name, self.table.clock.now + LEASE

    @precondition(lambda self: self.holder is not None)
    @rule()
    def renew(self) -> None:
        assert self.holder is not None
        alive = self.table.clock.now <= self.until
        assert self.table.renews(self.holder) == alive
        if alive:
            self.until = self.table.clock.now + LEASE
        else:
            self.holder = None

    @precondition(lambda self: self.holder is not None)
    @rule()
    def end(self) -> None:
        assert self.holder is not None
        self.table.turns.end(self.holder)
        self.holder = None

    @rule(seconds=st.sampled_from([1.0, 6.0, LEASE + 1]))
    def wait(self, seconds: float) -> None:
        self.table.clock.now += seconds

    @invariant()
    def at_most_one_may_act(self) -> None:
        acting = [name for name in "abcdef" if self.table.turns.held and self.table.turns.current == name]
        assert len(acting) <= 1
        if self.holder is not None and self.table.clock.now <= self.until:
            assert acting == [self.holder]

    @rule()
    def nobody_starves(self) -> None:
        """From any state: if all present ask at least once a second, each is served, and fairly."""
        served: Counter[str] = Counter()
        for _ in range(int(6 * (LEASE + 2)) + 20 * len(self.present)):
            for name in sorted(self.present):
                if self.table.turns.take(name):
                    served[name] += 1
                    self.table.turns.end(name)
            self.table.clock.now += 1.0
        self.holder = None
        if self.present:
            assert set(served) == self.present
            assert min(served.values()) >= 10


class AnyoneAnytimeInRandomOrder(AnyoneAnytime):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table("abc", RandomOrder())


quick = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyoneAnytime = AnyoneAnytime.TestCase
TestAnyoneAnytime.settings = quick
TestAnyoneAnytimeInRandomOrder = AnyoneAnytimeInRandomOrder.TestCase
TestAnyoneAnytimeInRandomOrder.settings = quick


def test_who_leaves_and_comes_back_keeps_its_place_and_gains_no_turn() -> None:
    table = Table("abc")
    assert table.play("abc", 1) == "a"
    table.turns.leave("a")
    table.turns.enter("a")
    assert table.play("abc", 5) == "bcabc"


def test_a_declared_order_outlives_a_run() -> None:
    table = Table("abc")
    assert table.play("abc", 3) == "abc"
    for name in "abc":
        table.turns.leave(name)
    for name in "cba":
        table.turns.enter(name)
    assert table.play("abc", 6) == "abcabc"


def test_a_lone_member_whose_lease_ran_out_has_its_turn_back_at_once() -> None:
    table = Table("a")
    assert table.turns.take("a")
    table.clock.now += LEASE + 1
    assert table.turns.take("a")
