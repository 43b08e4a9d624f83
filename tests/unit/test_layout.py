"""One flat vector for the shared tensors of a module, and what a collaboration starts from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lightning_ppdl.errors import ConfigurationError, FingerprintMismatchError
from lightning_ppdl.initial import initial_vector, public_initial
from lightning_ppdl.layout import ParameterLayout, require_patterns
from lightning_ppdl.records import Manifest


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Linear(1, 1)


def names(layout: ParameterLayout) -> list[str]:
    return [spec.name for spec in layout.specs]


def network() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=5), double=st.booleans())
@settings(max_examples=25, deadline=None)
def test_flatten_and_assign_round_trip(widths: list[int], double: bool) -> None:
    module = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    module = module.double() if double else module
    layout = ParameterLayout(module)
    vector = torch.arange(1.0, layout.size + 1)
    layout.assign(vector)
    assert layout.flatten().dtype == torch.float32
    assert torch.equal(layout.flatten(), vector)
    # The order is the module's own, each tensor row by row.
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in module.parameters()]).float(), vector)


def test_flatten_is_a_copy_and_assign_keeps_the_parameters() -> None:
    module = network()
    layout = ParameterLayout(module)
    before = list(module.parameters())
    flat = layout.flatten()
    flat += 1
    assert not torch.equal(flat, layout.flatten())
    layout.assign(flat)
    flat.zero_()
    assert layout.flatten().abs().sum() > 0
    assert all(a is b and a.requires_grad for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)],
)
def test_exact_says_whether_the_vector_survives(dtype: torch.dtype, exact: bool) -> None:
    layout = ParameterLayout(nn.Linear(3, 3).to(dtype))
    vector = torch.full((12,), 1 / 3)
    layout.assign(vector)
    assert layout.exact == exact == torch.equal(layout.flatten(), vector)


def test_tied_weights_count_once() -> None:
    module = Tied()
    layout = ParameterLayout(module)
    assert names(layout) == ["embed.weight", "scale.weight", "scale.bias"]
    assert layout.size == 17
    layout.assign(torch.arange(17.0))
    assert torch.equal(module.head.weight, torch.arange(15.0).reshape(5, 3))


def test_non_contiguous_and_scalar_parameters() -> None:
    module = nn.Module()
    module.register_parameter("turned", nn.Parameter(torch.arange(6.0).reshape(2, 3).t()))
    module.register_parameter("scalar", nn.Parameter(torch.tensor(7.0)))
    layout = ParameterLayout(module)
    assert layout.flatten().tolist() == [0, 3, 1, 4, 2, 5, 7]
    layout.assign(torch.arange(7.0))
    assert layout.flatten().tolist() == list(range(7))
    assert [layout.names_where(torch.arange(layout.size) == i) for i in (0, 5, 6)] == [
        ["turned"],
        ["turned"],
        ["scalar"],
    ]


def test_frozen_parameters_stay_local() -> None:
    module = network()
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    layout = ParameterLayout(module)
    assert names(layout) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    layout.assign(torch.zeros(layout.size))
    assert torch.equal(module[0].weight, frozen)
    assert names(ParameterLayout(module, share="*")) == names(layout)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ("2.*", ["2.weight", "2.bias"]),
        ("*.bias", ["0.bias", "1.bias", "2.bias"]),
        (["0.weight", "2.b*"], ["0.weight", "2.bias"]),
        (lambda name, p: p.ndim == 2, ["0.weight", "2.weight"]),
        (lambda name, p: name.startswith("1"), ["1.weight", "1.bias"]),
    ],
)
def test_share_by_pattern_and_predicate(
    share: str | Sequence[str] | Callable[[str, nn.Parameter], bool], expected: list[str]
) -> None:
    assert names(ParameterLayout(network(), share)) == expected


def test_buffers_only_on_request() -> None:
    module = network()
    assert not any("running" in name for name in names(ParameterLayout(module)))
    layout = ParameterLayout(module, share="2.*", share_buffers="*.running_*")
    assert names(layout) == ["2.weight", "2.bias", "1.running_mean", "1.running_var"]
    layout.assign(torch.full((layout.size,), 0.5))
    assert module[1].running_mean.tolist() == [0.5] * 3
    # An integer buffer is not shared, whatever the pattern.
    assert "1.num_batches_tracked" not in names(ParameterLayout(module, share_buffers="*"))


def test_a_share_that_picks_nothing_lists_the_names() -> None:
    with pytest.raises(ConfigurationError, match=r"share='lora'.* matches none .* 0\.weight, 0\.bias"):
        ParameterLayout(network(), "lora")
    with pytest.raises(ConfigurationError, match="every parameter is frozen"):
        ParameterLayout(network().requires_grad_(False))


def test_what_cannot_be_shared_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'0\.weight'.*not materialised"):
        ParameterLayout(nn.Sequential(nn.LazyLinear(3)))
    module = nn.Module()
    module.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(ConfigurationError, match=r"'phase' has dtype torch\.complex64"):
        ParameterLayout(module)


def test_gradients_of_the_stepped_and_shared_parameters_add_up() -> None:
    module: Any = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1), nn.Linear(1, 1))
    layout = ParameterLayout(module, share=["0.*", "1.*"])
    module(torch.tensor([1, 1, 3])).sum().backward()
    total = torch.ones(layout.size)
    stepped = [*module[0].parameters(), module[1].weight, module[2].weight]
    layout.add_gradients(total, stepped)
    expected = torch.cat(
        [
            module[0].weight.grad.to_dense().reshape(-1),
            module[1].weight.grad.reshape(-1),
            torch.zeros(1),
        ]
    )
    assert expected.abs().sum() > 0
    torch.testing.assert_close(total, 1 + expected)


def manifest(module: nn.Module, **changes: Any) -> Manifest:
    return Manifest(ParameterLayout(module).specs, **changes)


@pytest.mark.parametrize(
    ("joining", "difference"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 9)), r"parameter 2 is '1\.weight' \[9, 3\]"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).half(), r"parameter 0 is '0\.weight' .*float16"),
        (nn.Sequential(nn.Linear(4, 3)), r"parameter '1\.weight' \[2, 3\] exists only there"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 1)),
            r"parameter '2\.weight' \[1, 2\] exists only here",
        ),
        (nn.ModuleDict({"a": nn.Linear(4, 3)}), r"parameter 0 is 'a\.weight' .* here, '0\.weight' .* there"),
    ],
)
def test_the_first_parameter_that_differs_is_named(joining: nn.Module, difference: str) -> None:
    ours = manifest(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with pytest.raises(FingerprintMismatchError, match=difference) as raised:
        ours.require_same_parameters(manifest(joining), "memory://study")
    assert "lightning_ppdl.close('memory://study')" in str(raised.value)


def test_the_quantity_counts_and_what_is_released_does_not() -> None:
    module = network()
    ours = manifest(module)
    with pytest.raises(FingerprintMismatchError, match="quantity='gradient', the others share 'change'"):
        ours.require_same_parameters(manifest(module, quantity="gradient"), "memory://study")
    ours.require_same_parameters(manifest(network(), upload_fraction=0.1, bound=1.0), "memory://study")


def test_public_initial_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, second = network(), network()
    with torch.no_grad():
        second[1].running_mean.fill_(7.0)
    one, other = (public_initial(m, ParameterLayout(m), 5) for m in (first, second))
    assert torch.equal(one, other)
    assert torch.equal(one, public_initial(first, ParameterLayout(first), 5))
    assert not torch.equal(one, public_initial(first, ParameterLayout(first), 6))
    torch.manual_seed(5)
    assert torch.equal(one, ParameterLayout(network()).flatten())


def test_public_initial_leaves_module_and_generator_alone() -> None:
    module = network()
    module(torch.randn(8, 4))
    module[0].requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.random.get_rng_state()
    vector = public_initial(module, ParameterLayout(module, share_buffers="*running*"), 0)
    assert vector[-6:].tolist() == [0.0] * 3 + [1.0] * 3
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module[0].weight.requires_grad and module[2].weight.requires_grad


def test_public_initial_knows_attention_and_names_layers_that_cannot() -> None:
    attention = nn.TransformerEncoderLayer(4, 2, 8)
    vector = public_initial(attention, ParameterLayout(attention), 0)
    assert torch.isfinite(vector).all() and vector.abs().sum() > 0

    module = nn.Module()
    module.register_parameter("token", nn.Parameter(torch.zeros(3)))
    module.register_parameter("other", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ConfigurationError, match=r"initial=7 .*'token' and 1 more.*reset_parameters"):
        public_initial(module, ParameterLayout(module), 7)


def test_initial_from_a_file_and_from_the_module(tmp_path: Path) -> None:
    source, module = network(), network()
    path = tmp_path / "start.safetensors"
    save_file(source.state_dict(), path)
    layout = ParameterLayout(module, share=["0.*", "2.*"])
    expected = ParameterLayout(source, share=["0.*", "2.*"]).flatten()
    assert torch.equal(initial_vector(path, module, layout), expected)
    assert torch.equal(initial_vector("own", module, layout), layout.flatten())
    assert torch.equal(initial_vector(3, module, layout), public_initial(module, layout, 3))
    save_file({"0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ConfigurationError, match=r"must hold '0\.weight' of shape \[3, 4\]"):
        initial_vector(str(path), module, layout)
    with pytest.raises(ConfigurationError, match=r"initial='nowhere' cannot be read"):
        initial_vector("nowhere", module, layout)


@pytest.mark.parametrize("argument", ["share", "share_buffers"])
def test_a_pattern_that_matches_nothing_is_refused_beside_one_that_does(argument: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    right = {"share": "0.*", "share_buffers": "1.running_*"}[argument]
    with pytest.raises(ConfigurationError, match=rf"{argument}=.*'1\.runing_\*' matches none"):
        ParameterLayout(module, **{argument: [right, "1.runing_*"]})


def half_reset() -> nn.Module:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.tensor([7.0]))  # what reset_parameters() does not reach

    return Scaled()


@pytest.mark.parametrize(
    ("module", "name"),
    [(half_reset(), "scale"), (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "original0")],
)
def test_a_public_seed_is_refused_where_a_value_of_the_module_would_leave(
    module: nn.Module, name: str
) -> None:
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=f"cannot set .*{name}"):
        public_initial(module, ParameterLayout(module), 0)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_a_reset_that_replaces_its_parameter_is_undone() -> None:
    class Replacing(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.rand(2, 2))
            self.bias = nn.Parameter(torch.zeros(2))

    module = Replacing(2, 2)
    weight, values = module.weight, module.weight.detach().clone()
    public_initial(module, ParameterLayout(module), 0)
    assert module.weight is weight
    torch.testing.assert_close(module.weight.detach(), values)


def test_zeros_on_purpose_that_a_public_seed_would_undo_are_named(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.LayerNorm(2))
    public_initial(module, ParameterLayout(module), 5)
    assert not caplog.records  # a norm's bias is zero, and stays zero
    nn.init.zeros_(module[1].weight)  # type: ignore[arg-type]
    public_initial(module, ParameterLayout(module), 5)
    assert "initial=5" in caplog.text and "'1.weight' random values" in caplog.text
    assert torch.count_nonzero(module[1].weight) == 0  # type: ignore[arg-type]


def test_a_public_seed_gives_the_same_in_every_thread_and_leaves_the_global_generator() -> None:
    def draw(_: int) -> torch.Tensor:
        module = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))
        for _ in range(10):
            torch.rand(3)  # other threads draw from the global generator meanwhile
        return public_initial(module, ParameterLayout(module), 5)

    expected = draw(0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    layers = nn.Linear(4, 4)
    torch.set_rng_state(state)
    public_initial(layers, ParameterLayout(layers), 5)
    assert torch.equal(torch.get_rng_state(), state)
    with ThreadPoolExecutor(8) as threads:
        for drawn in threads.map(draw, range(64)):
            torch.testing.assert_close(drawn, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [3, ["a", 3], {"a": 1}])
def test_patterns_are_strings(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="share="):
        require_patterns("share", value)
    assert require_patterns("share", None) is None and require_patterns("share", ["*.a"]) == ["*.a"]
