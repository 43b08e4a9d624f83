"""What a restart must keep, case by case: sessions, receipts, turns, members, and the rules."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from durable_harness import MANIFEST, SIZE, flush, joined, message, serving

from lightning_ppdl import (
    Add,
    Asynchronous,
    ExchangeProtocol,
    MergeRule,
    RandomOrder,
    Remainder,
    RoundRobin,
    ServerMomentum,
    ServerOptimizer,
    StalenessWeighted,
    Synchronous,
)
from lightning_ppdl.errors import (
    ConfigurationError,
    RoundSeenBeforeError,
    SessionEndedError,
    TurnNotHeldError,
    UnknownParticipantError,
)
from lightning_ppdl.server.state import StateDirectory

NAMES = ["anna", "ben", "cleo", "dora"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_a_session_a_receipt_and_the_study_survive(path: Path) -> None:
    server = serving(path)
    anna, ben = joined(server, "anna"), joined(server, "ben")
    first, second = server.upload(anna, message("anna")), server.upload(ben, message("ben"))
    study, parameters = server.study, server.parameters()
    server.close()
    server = serving(path)
    assert (server.study, server.version) == (study, 2)
    np.testing.assert_array_equal(server.parameters(), parameters)
    assert server.upload(ben, message("ben")) == second  # a retry
    with pytest.raises(RoundSeenBeforeError):
        server.upload(anna, message("anna", seed=1))
    assert server.upload(anna, message("anna", 2, 1)).version == 3
    assert first.version == 1 and server.join("ben", MANIFEST).last_round == 1
    with pytest.raises(SessionEndedError):
        server.upload(ben, message("ben", 2))
    server.close()


@pytest.mark.parametrize("protocol", [RoundRobin(), RandomOrder(seed=1)])
def test_a_round_in_progress_can_still_be_uploaded(path: Path, protocol: ExchangeProtocol) -> None:
    server = serving(path, protocol=protocol)
    sessions = {name: joined(server, name) for name in NAMES}
    for merged in range(6):
        name = next(name for name in NAMES if server.take_turn(sessions[name]))
        server.close()
        server = serving(path, protocol=protocol)
        assert server.status().awaited == (name,)
        server.upload(sessions[name], message(name, merged + 1, merged))
    assert server.version == 6
    server.close()


def test_the_turn_that_was_passed_on_without_an_upload_stays_passed_on(path: Path) -> None:
    server = serving(path, protocol=RoundRobin())
    anna, ben = joined(server, "anna"), joined(server, "ben")
    assert server.take_turn(anna)
    server.end_turn(anna)
    assert server.take_turn(ben)
    server.close()
    server = serving(path, protocol=RoundRobin())
    server.upload(ben, message("ben"))
    with pytest.raises(TurnNotHeldError):
        server.upload(ben, message("ben", 2))
    server.close()


def test_whoever_left_is_not_awaited_after_a_restart(path: Path) -> None:
    server = serving(path, protocol=RoundRobin())
    sessions = {name: joined(server, name) for name in NAMES}
    assert server.take_turn(sessions["anna"])
    server.leave(sessions["anna"])
    server.leave(sessions["cleo"])
    server.close()
    server = serving(path, protocol=RoundRobin())
    for turn, name in enumerate(["ben", "dora", "ben", "dora"]):
        assert server.take_turn(sessions[name])
        server.upload(sessions[name], message(name, turn + 1, turn))
    with pytest.raises(SessionEndedError):
        server.take_turn(sessions["anna"])
    server.close()


def test_whoever_left_is_not_awaited_although_its_turn_was_not_noted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if killed between the two."""
    server = serving(path, protocol=RoundRobin())
    anna, ben = joined(server, "anna"), joined(server, "ben")
    flush(server)
    monkeypatch.setattr(StateDirectory, "note", lambda *arguments: None)
    server.leave(anna)
    server.join("cleo", MANIFEST)
    server.close()
    monkeypatch.undo()
    server = serving(path, protocol=RoundRobin())
    assert server.take_turn(ben)
    server.close()


def test_the_first_cycle_goes_on_without_those_that_left_before_the_restart(path: Path) -> None:
    """Under the synchronous protocol, and with a list of members."""
    server = serving(path, protocol=Synchronous(), members=NAMES)
    sessions = {name: joined(server, name) for name in NAMES[:3]}
    server.leave(sessions["cleo"])
    server.close()
    server = serving(path, protocol=Synchronous(), members=[*NAMES, "emil"])
    for name in ("anna", "ben"):
        assert server.take_turn(sessions[name])
    assert server.status().awaited == ("dora", "emil", "anna", "ben")
    server.close()


def test_one_that_stays_may_go_on_alone_after_a_restart(path: Path) -> None:
    server = serving(path, protocol=Synchronous())
    anna, ben = joined(server, "anna"), joined(server, "ben")
    for session, name in ((anna, "anna"), (ben, "ben")):
        assert server.take_turn(session)
        server.upload(session, message(name))
    server.close()
    server = serving(path, protocol=Synchronous())
    server.leave(anna)
    assert server.take_turn(ben)
    server.close()


def test_new_members_take_their_place_and_former_ones_are_away(path: Path) -> None:
    server = serving(path, protocol=RandomOrder(seed=2), members=["anna", "ben", "cleo"])
    sessions = {name: joined(server, name) for name in ("anna", "ben", "cleo")}
    first = next(name for name in sessions if server.take_turn(sessions[name]))
    server.upload(sessions[first], message(first))
    second = next(name for name in sessions if server.take_turn(sessions[name]))
    server.close()
    server = serving(path, protocol=RandomOrder(seed=2), members=[first, second, "dora"])
    assert server.take_turn(sessions[second])  # the turn that it had
    (gone,) = set(sessions) - {first, second}
    with pytest.raises(SessionEndedError):
        server.take_turn(sessions[gone])
    with pytest.raises(UnknownParticipantError):
        server.join(gone, MANIFEST)
    server.upload(sessions[second], message(second))
    sessions["dora"] = joined(server, "dora")
    rounds = dict.fromkeys(sessions, 1)
    served = []
    for _ in range(6):
        name = next(name for name in (first, second, "dora") if server.take_turn(sessions[name]))
        rounds[name] += 1
        server.upload(sessions[name], message(name, rounds[name]))
        served.append(name)
    assert sorted(served[:3]) == sorted(served[3:]) == sorted([first, second, "dora"])
    server.close()


@pytest.mark.parametrize("rule", [Add(), ServerMomentum(0.5)])
def test_a_lost_cycle_and_one_whose_merge_fails_keep_their_receipts(
    path: Path, rule: MergeRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered is answered the same after a restart; none of it is merged."""
    server = serving(path, protocol=Synchronous(quorum=2), merge=rule)
    anna, ben = joined(server, "anna"), joined(server, "ben")
    for session in (anna, ben):
        assert server.take_turn(session)
    lost = server.upload(anna, message("anna"))
    server.end_turn(ben)  # the cycle is over, one upload is too few
    for session in (anna, ben):
        assert server.take_turn(session)
    failed = server.upload(anna, message("anna", 2))
    with monkeypatch.context() as patch:
        patch.setattr(type(rule), "merge", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.upload(ben, message("ben"))
    assert (lost.version, failed.version, server.version) == (1, 1, 0)
    for _ in range(2):
        server.close()
        server = serving(path, protocol=Synchronous(quorum=2), merge=copy.copy(rule))
        assert server.version == 0 and not server.parameters().any()
        assert server.upload(anna, message("anna", 2)) == failed
        with pytest.raises(RoundSeenBeforeError):
            server.upload(ben, message("ben", seed=1))
    server.close()


def test_where_it_started_is_not_asked_for_again(path: Path, tmp_path: Path) -> None:
    initial = np.arange(SIZE, dtype=np.float32)
    server = serving(path, initial=initial)
    anna = joined(server, "anna")
    server.upload(anna, message("anna"))
    parameters = server.parameters()
    server.close()
    for elsewhere in (tmp_path / "was-deleted.safetensors", np.ones(SIZE, np.float32), None):
        server = serving(path, initial=elsewhere)
        np.testing.assert_array_equal(server.parameters(), parameters)
        server.close()


def test_parameters_that_come_with_the_restart_are_durable_before_the_first_upload(path: Path) -> None:
    server = serving(path)
    anna = server.join("anna", MANIFEST).session
    server.close()
    server = serving(path, initial=np.ones(SIZE, np.float32))
    receipt = server.upload(anna, message("anna"))
    parameters = server.parameters()
    server.close()
    server = serving(path)
    assert server.upload(anna, message("anna")) == receipt
    np.testing.assert_array_equal(server.parameters(), parameters)
    server.close()


def sgd_at_the_server(**settings: Any) -> ServerOptimizer:
    return ServerOptimizer(partial(torch.optim.SGD, lr=0.1, **settings))


@pytest.mark.parametrize(
    ("began", "now", "said"),
    [
        ({"merge": Add()}, {"merge": Remainder()}, "merge=Remainder: .* began with Add"),
        ({"protocol": RoundRobin()}, {"protocol": Asynchronous()}, "protocol=Asynchronous: .* RoundRobin"),
        (
            {"merge": ServerMomentum(0.9, Remainder())},
            {"merge": ServerMomentum(0.9)},
            "merge.rule=Add: .* began with Remainder",
        ),
        (
            {"merge": sgd_at_the_server(momentum=0.9)},
            {"merge": ServerOptimizer(partial(torch.optim.Adam, lr=0.1))},
            "merge.optimizer=Adam: .* began with SGD",
        ),
        (
            {"merge": StalenessWeighted(0.5)},
            {"merge": StalenessWeighted()},
            "merge.exponent=1.0: .* with 0.5",
        ),
        (
            {"merge": ServerMomentum(0.9)},
            {"merge": ServerMomentum(0.5)},
            "merge.momentum=0.5: .* with 0.9",
        ),
        (
            {"merge": ServerMomentum(0.9, StalenessWeighted(1))},
            {"merge": ServerMomentum(0.9, StalenessWeighted(2))},
            "merge.rule.exponent=2: .* began with 1",
        ),
        (
            {"merge": sgd_at_the_server()},
            {"merge": sgd_at_the_server(momentum=0.5)},
            "merge.optimizer.momentum=0.5: .* began with 0",
        ),
    ],
)
def test_other_rules_are_refused_with_the_remedy(
    path: Path, began: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    server = serving(path, **began)
    anna = joined(server, "anna")
    server.take_turn(anna)
    server.upload(anna, message("anna"))
    server.close()
    for _ in range(2):  # and what refused holds nothing
        with pytest.raises(ConfigurationError, match=said + r".* ?.*initial=FILE .*ppdl export"):
            serving(path, **now)
