"""A server that is restarted, at any moment and however often, gives what one gives that never was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from durable_harness import Twins, encoded

from lightning_ppdl import (
    Add,
    Asynchronous,
    ExchangeProtocol,
    MergeRule,
    MostUpdated,
    ParameterServer,
    RandomOrder,
    Remainder,
    RoundRobin,
    ServerMomentum,
    ServerOptimizer,
    StalenessWeighted,
    Synchronous,
)

NAMES = ["anna", "ben", "cleo", "dora"]
PROTOCOLS: dict[str, Callable[[], ExchangeProtocol]] = {
    "round robin": RoundRobin,
    "random order": partial(RandomOrder, seed=3),
    "asynchronous": Asynchronous,
    "synchronous": Synchronous,
}
RULES: dict[str, Callable[[], MergeRule]] = {
    "add": Add,
    "remainder": Remainder,
    "staleness": partial(StalenessWeighted, 0.5),
    "momentum": lambda: ServerMomentum(0.9, Remainder()),
    "sgd": lambda: ServerOptimizer(partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "adam": lambda: ServerOptimizer(partial(torch.optim.Adam, lr=0.01)),
}


def make(protocol: str, rule: str, **settings: Any) -> ParameterServer:
    return ParameterServer(
        protocol=PROTOCOLS[protocol](), merge=RULES[rule](), criterion=MostUpdated(decay=0.5), **settings
    )


class Walk:
    """Random requests of a few participants, and restarts in between."""

    def __init__(self, twins: Twins, synchronous: bool, seed: int) -> None:
        self.twins = twins
        self.synchronous = synchronous
        self.stream = np.random.default_rng(seed)
        self.rounds = dict.fromkeys(NAMES, 0)
        self.versions: dict[str, int | None] = dict.fromkeys(NAMES)
        self.last: dict[str, bytes] = {}
        self.merged = self.restarts = 0

    def step(self) -> None:
        name = str(self.stream.choice(NAMES))
        chance = self.stream.random()
        if name not in self.twins.sessions or chance < 0.04:
            self.twins.join(name)
        elif chance < 0.08:
            self.twins.ask("leave", name)
        elif chance < 0.11:
            self.twins.ask("end_turn", name)
        elif chance < 0.16 and name in self.last:
            self.twins.ask("upload", name, self.last[name])  # again, perhaps after a restart
        elif chance < 0.20 and self.rounds[name]:
            other = encoded(name, self.rounds[name], 0, self.stream)
            self.twins.ask("upload", name, other)
        elif chance < 0.23:
            self.twins.clock.now += 61  # every lease runs out, and a request is made while it is so
            for each in self.twins.sessions:
                self.twins.ask("renew_turn", each)
        elif chance < 0.33:
            self.restart()
        else:
            self.round(name)

    def round(self, name: str) -> None:
        """A turn, whole or with a restart between its parts."""
        if self.twins.ask("take_turn", name) is not True:
            return
        known = self.versions[name]
        fraction = 1.0 if self.synchronous else float(self.stream.choice([0.3, 1.0]))
        self.versions[name] = self.twins.download(name, known, fraction)
        if self.stream.random() < 0.2:
            self.restart()
        base = self.versions[name] or 0
        if not self.synchronous:  # as if others had been faster
            base = max(0, base - int(self.stream.integers(0, 4)))
        self.last[name] = encoded(name, self.rounds[name] + 1, base, self.stream)
        answer = self.twins.ask("upload", name, self.last[name])
        if not isinstance(answer, tuple):
            self.rounds[name] += 1
            self.merged += 1

    def restart(self) -> None:
        if self.synchronous and self.twins.steady.status().awaited:
            return  # what an open cycle has collected is not kept
        self.twins.restart(kill=bool(self.stream.integers(2)))
        self.restarts += 1
        self.twins.compare()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("seed", "compact_bytes"), [(0, 2**26), (1, 1), (2, 1500)])
def test_restarts_change_nothing(
    tmp_path: Path, protocol: str, rule: str, seed: int, compact_bytes: int
) -> None:
    twins = Twins(tmp_path, partial(make, protocol, rule), compact_bytes)
    walk = Walk(twins, protocol == "synchronous", seed)
    for _ in range(70):
        walk.step()
    assert walk.merged >= 5 and walk.restarts >= (1 if walk.synchronous else 3)
    twins.close()


@pytest.mark.parametrize("protocol", [RoundRobin(), RandomOrder(), Synchronous()])
def test_what_happens_later_does_not_change_a_state_on_its_way_to_the_disk(
    protocol: ExchangeProtocol,
) -> None:
    turns = protocol.make_turns(["anna", "ben"], 60.0, lambda: 0.0)
    turns.take("anna")
    state = turns.state_dict()
    before = copy.deepcopy(state)
    turns.enter("cleo")
    turns.end("anna")
    turns.leave("ben")
    assert state == before != turns.state_dict()
