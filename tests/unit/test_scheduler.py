"""The cooperative scheduler: order, virtual time, waiting, and how a run ends when a task does not."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.errors import ParticipantFailedError
from lightning_ppdl.simulation.scheduler import Scheduler


def test_tasks_start_in_the_order_in_which_they_were_added() -> None:
    scheduler = Scheduler()
    seen: list[str] = []
    for name in "cab":
        scheduler.start(name, lambda name=name: seen.append(name))  # type: ignore[misc]
    assert seen == []
    scheduler.run()
    assert seen == ["c", "a", "b"]


def test_a_run_without_tasks_ends_at_once() -> None:
    scheduler = Scheduler()
    scheduler.run()
    assert scheduler.now == 0.0


def test_a_task_that_never_suspends_runs_whole_before_the_next_one() -> None:
    scheduler = Scheduler()
    seen: list[str] = []

    def task(name: str) -> Callable[[], None]:
        def run() -> None:
            seen.append(f"{name} begins")
            scheduler.wait(lambda: True, 1.0)
            seen.append(f"{name} ends")

        return run

    scheduler.start("first", task("first"))
    scheduler.start("second", task("second"))
    scheduler.run()
    assert seen == ["first begins", "first ends", "second begins", "second ends"]


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=8))
def test_sleepers_wake_by_virtual_time_and_ties_in_the_order_of_falling_asleep(naps: list[float]) -> None:
    scheduler = Scheduler()
    woken: list[tuple[float, int]] = []

    def task(index: int, nap: float) -> Callable[[], None]:
        def run() -> None:
            scheduler.sleep(nap)
            woken.append((scheduler.now, index))

        return run

    for index, nap in enumerate(naps):
        scheduler.start(str(index), task(index, nap))
    scheduler.run()
    assert woken == sorted((nap, index) for index, nap in enumerate(naps))


def test_naps_add_up_and_cost_no_real_time() -> None:
    scheduler = Scheduler()
    times: list[float] = []

    def run() -> None:
        for _ in range(1000):
            scheduler.sleep(3600.0)
        times.append(scheduler.now)

    scheduler.start("sleeper", run)
    scheduler.run()
    assert times == [3_600_000.0]


def test_a_waiter_goes_on_before_time_moves() -> None:
    scheduler = Scheduler()
    seen: list[tuple[str, float, bool]] = []
    open_door: list[bool] = []

    def waiter() -> None:
        answer = scheduler.wait(lambda: bool(open_door), 1.0)
        seen.append(("waiter", scheduler.now, answer))

    def opener() -> None:
        scheduler.sleep(2.0)
        open_door.append(True)
        scheduler.sleep(3.0)
        seen.append(("opener", scheduler.now, True))

    scheduler.start("waiter", waiter)
    scheduler.start("opener", opener)
    scheduler.run()
    assert seen == [("waiter", 2.0, True), ("opener", 5.0, True)]


def test_among_several_that_may_go_on_the_one_that_has_waited_longest_does() -> None:
    scheduler = Scheduler()
    seen: list[str] = []
    open_door: list[bool] = []

    def waiter(name: str) -> Callable[[], None]:
        def run() -> None:
            scheduler.wait(lambda: bool(open_door), 1.0)
            seen.append(name)

        return run

    for name in ("a", "b", "c"):
        scheduler.start(name, waiter(name))
    scheduler.start("opener", lambda: open_door.append(True))
    scheduler.run()
    assert seen == ["a", "b", "c"]


def test_a_deadlock_answers_false_instead_of_hanging() -> None:
    scheduler = Scheduler()
    answers: dict[str, bool] = {}

    def waiter(name: str) -> Callable[[], None]:
        def run() -> None:
            answers[name] = scheduler.wait(lambda: False, 3600.0)

        return run

    scheduler.start("a", waiter("a"))
    scheduler.start("b", waiter("b"))
    scheduler.run()
    assert answers == {"a": False, "b": False}


def test_a_failure_is_named_keeps_its_cause_and_ends_all_others() -> None:
    scheduler = Scheduler()
    seen: list[str] = []

    def endless(name: str) -> Callable[[], None]:
        def run() -> None:
            try:
                while True:
                    scheduler.sleep(1.0)
            finally:
                seen.append(f"{name} cleaned up")

        return run

    def fails() -> None:
        scheduler.sleep(10.5)
        raise ZeroDivisionError("no data left")

    scheduler.start("anna", endless("anna"))
    scheduler.start("bob", fails)
    scheduler.start("cleo", endless("cleo"))
    with pytest.raises(ParticipantFailedError, match="bob failed: ZeroDivisionError: no data left") as caught:
        scheduler.run()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert frames[-1].name == "fails"
    assert sorted(seen) == ["anna cleaned up", "cleo cleaned up"]
    assert scheduler.now == 10.5


def test_a_task_that_has_not_begun_when_another_fails_never_begins() -> None:
    scheduler = Scheduler()
    seen: list[str] = []

    def fails() -> None:
        raise RuntimeError("at once")

    scheduler.start("bob", fails)
    scheduler.start("late", lambda: seen.append("late"))
    with pytest.raises(ParticipantFailedError, match="bob"):
        scheduler.run()
    assert seen == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_inside_a_task_interrupts_the_run_and_ends_the_others(error: BaseException) -> None:
    scheduler = Scheduler()
    ended: list[str] = []

    def patient() -> None:
        try:
            scheduler.wait(lambda: False, 1.0)
        finally:
            ended.append("patient")

    def interrupted() -> None:
        raise error

    scheduler.start("patient", patient)
    scheduler.start("interrupted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.run()
    assert ended == ["patient"]


def test_an_interrupt_between_tasks_ends_the_tasks_too() -> None:
    scheduler = Scheduler()
    ended: list[str] = []

    def interrupt() -> bool:
        raise KeyboardInterrupt

    def task() -> None:
        checks = iter([lambda: False, interrupt])
        try:
            # The first look is the task's own; the next one is the scheduler's.
            scheduler.wait(lambda: next(checks)(), 1.0)
        finally:
            ended.append("task")

    scheduler.start("task", task)
    with pytest.raises(KeyboardInterrupt):
        scheduler.run()
    assert ended == ["task"]


def test_time_stops_where_a_waiter_must_look_again_and_not_before_an_earlier_sleeper() -> None:
    scheduler = Scheduler()
    seen: list[tuple[str, float]] = []

    def waiter() -> None:
        assert scheduler.wait(lambda: scheduler.now >= 2.5, 1.0, lambda: 2.5 - scheduler.now)
        seen.append(("waiter", scheduler.now))

    def sleeper() -> None:
        for _ in range(2):
            scheduler.sleep(2.0)
            seen.append(("sleeper", scheduler.now))

    scheduler.start("waiter", waiter)
    scheduler.start("sleeper", sleeper)
    scheduler.run()
    assert seen == [("sleeper", 2.0), ("waiter", 2.5), ("sleeper", 4.0)]


def test_an_expiry_that_changes_nothing_is_no_reason_to_wait_for_ever() -> None:
    scheduler = Scheduler()
    answers: list[bool] = []
    scheduler.start(
        "a", lambda: answers.append(scheduler.wait(lambda: False, 1.0, lambda: 3.0 - scheduler.now))
    )
    scheduler.run()
    assert answers == [False] and scheduler.now == 3.0
