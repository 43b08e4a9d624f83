"""Each merge rule against the formula it stands for, computed the long way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.records import Quantity, SparseUpdate, Vector
from lightning_ppdl.server.merge import (
    Add,
    MergeContext,
    MergeRule,
    ServerMomentum,
    ServerOptimizer,
    StalenessWeighted,
)
from lightning_ppdl.server.store import MemoryStore

SIZE = 12


def random_update(stream: np.random.Generator, round_: int = 1) -> SparseUpdate:
    count = int(stream.integers(0, SIZE + 1))
    indices = np.sort(stream.choice(SIZE, count, replace=False)).astype(np.int64)
    return SparseUpdate("anna", round_, 0, indices, stream.standard_normal(count).astype(np.float32))


def dense(update: SparseUpdate) -> Any:
    full = np.zeros(SIZE)
    for index, value in zip(update.indices, update.values):
        full[index] += value
    return full


class Server:
    """A store and a rule, as the server uses them."""

    def __init__(self, rule: MergeRule, quantity: Quantity = "change") -> None:
        self.rule = rule
        self.quantity = quantity
        self.store = MemoryStore(np.linspace(-1, 1, SIZE).astype(np.float32))

    @property
    def parameters(self) -> Vector:
        return np.array(self.store.parameters)

    def merge(self, update: SparseUpdate, staleness: int = 0) -> Vector:
        context = MergeContext(staleness, self.quantity, self.store.parameters)
        self.store.commit(self.rule.merge(update, context), update.indices, decay=1.0)
        return self.parameters


seeds = st.integers(0, 2**32)


@given(seed=seeds)
def test_add(seed: int) -> None:
    stream = np.random.default_rng(seed)
    server = Server(Add())
    expected = server.parameters.astype(np.float64)
    for _ in range(4):
        update = random_update(stream)
        expected += dense(update)
        np.testing.assert_allclose(server.merge(update, staleness=5), expected, atol=1e-5)


@given(seed=seeds, exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_staleness_weighted(seed: int, exponent: float) -> None:
    stream = np.random.default_rng(seed)
    server = Server(StalenessWeighted(exponent))
    expected = server.parameters.astype(np.float64)
    for staleness in (0, 1, 7, 1000):
        update = random_update(stream)
        expected += dense(update) / (1 + staleness) ** exponent
        np.testing.assert_allclose(server.merge(update, staleness), expected, atol=1e-5)


@given(seed=seeds, momentum=st.sampled_from([0.0, 0.5, 0.9]))
def test_server_momentum(seed: int, momentum: float) -> None:
    stream = np.random.default_rng(seed)
    server = Server(ServerMomentum(momentum, StalenessWeighted(1.0)))
    expected, velocity = server.parameters.astype(np.float64), np.zeros(SIZE)
    for staleness in (0, 3, 0, 1, 2):
        update = random_update(stream)
        velocity = momentum * velocity + dense(update) / (1 + staleness)
        expected += velocity
        np.testing.assert_allclose(server.merge(update, staleness), expected, atol=1e-5)


def test_server_momentum_is_of_plain_addition_by_default() -> None:
    stream = np.random.default_rng(0)
    with_momentum, plain = Server(ServerMomentum(0.0)), Server(Add())
    for _ in range(3):
        update = random_update(stream)
        np.testing.assert_allclose(with_momentum.merge(update), plain.merge(update), atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.SGD, lr=0.1),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        functools.partial(torch.optim.Adam, lr=0.05),
        functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("quantity", ["change", "gradient"])
def test_server_optimizer_is_the_torch_optimizer(make: Any, quantity: Quantity) -> None:
    stream = np.random.default_rng(3)
    server = Server(ServerOptimizer(make), quantity)
    parameter = torch.nn.Parameter(torch.from_numpy(server.parameters))
    optimizer = make([parameter])
    for _ in range(8):
        update = random_update(stream)
        gradient = torch.from_numpy(dense(update)).float()
        parameter.grad = gradient if quantity == "gradient" else -gradient
        optimizer.step()
        np.testing.assert_allclose(server.merge(update), parameter.detach().numpy(), atol=1e-6)


@given(seed=seeds, rate=st.sampled_from([0.01, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_sgd_on_gradients_is_adding_their_negative(seed: int, rate: float) -> None:
    stream = np.random.default_rng(seed)
    server = Server(ServerOptimizer(functools.partial(torch.optim.SGD, lr=rate)), "gradient")
    expected = server.parameters.astype(np.float64)
    for _ in range(3):
        update = random_update(stream)
        expected -= rate * dense(update)
        np.testing.assert_allclose(server.merge(update), expected, atol=1e-5)


def test_sgd_with_rate_one_on_changes_is_add() -> None:
    stream = np.random.default_rng(5)
    optimizer, add = Server(ServerOptimizer(functools.partial(torch.optim.SGD, lr=1.0))), Server(Add())
    for _ in range(4):
        update = random_update(stream)
        np.testing.assert_allclose(optimizer.merge(update), add.merge(update), atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        Add(),
        StalenessWeighted(),
        ServerMomentum(),
        ServerOptimizer(functools.partial(torch.optim.SGD, lr=1.0)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_an_empty_update_and_the_inputs_are_left_alone(rule: MergeRule) -> None:
    server = Server(rule)
    before = server.parameters
    empty = SparseUpdate("anna", 1, 0, np.zeros(0, np.int64), np.zeros(0, np.float32))
    np.testing.assert_array_equal(server.merge(empty, staleness=3), before)

    update = random_update(np.random.default_rng(1))
    values, parameters = update.values.copy(), server.parameters
    rule.merge(update, MergeContext(2, "change", server.store.parameters))
    np.testing.assert_array_equal(update.values, values)
    np.testing.assert_array_equal(server.parameters, parameters)


def test_which_quantities_a_rule_takes() -> None:
    sgd = ServerOptimizer(functools.partial(torch.optim.SGD, lr=1.0))
    assert "gradient" in sgd.quantities and "change" in sgd.quantities
    for rule in (Add(), StalenessWeighted(), ServerMomentum()):
        assert rule.quantities == {"change"}


@pytest.mark.parametrize("exponent", [-1.0, float("nan"), float("inf"), "1", True])
def test_bad_exponents_are_named(exponent: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        StalenessWeighted(exponent)
    assert f"exponent={exponent!r}" in str(raised.value)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2, float("nan"), "0.9", True])
def test_bad_momenta_are_named(momentum: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        ServerMomentum(momentum)
    assert f"momentum={momentum!r}" in str(raised.value)
