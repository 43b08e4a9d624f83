"""A vector becomes named tensors in a file, and comes back."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.records import ParameterSpec, Vector
from lightning_ppdl.tensorfile import read_vector, require_tensor_file, write_vector

DTYPES = ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn")
SPECS = (ParameterSpec("a.weight", (2, 3), "float32"), ParameterSpec("b", (4,), "bfloat16"))
VECTOR = (np.arange(10) / 3).astype(np.float32)


def refusal(path: Path, vector: Vector = VECTOR, specs: tuple[ParameterSpec, ...] = SPECS) -> str:
    before = {entry.name: entry.read_bytes() for entry in path.parent.glob("*") if entry.is_file()}
    with pytest.raises(ConfigurationError) as caught:
        write_vector(path, vector, specs)
    assert {entry.name: entry.read_bytes() for entry in path.parent.glob("*") if entry.is_file()} == before
    return str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_vector_comes_back_as_a_module_of_its_dtypes_would_hold_it(
    tensors: list[tuple[list[int], str]], seed: int
) -> None:
    module = torch.nn.Module()
    for number, (shape, dtype) in enumerate(tensors):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype)))
        module.register_parameter(f"p{number}", parameter)
    layout = ParameterLayout(module)
    vector = np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)
    layout.assign(torch.from_numpy(vector))
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        write_vector(path, vector, layout.specs, {"version": "3"})
        np.testing.assert_array_equal(read_vector(path, layout.specs), layout.flatten().numpy())
        loaded = safetensors.torch.load_file(path)
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "version": "3"}
    own = dict(module.named_parameters())
    assert set(loaded) == set(own)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape) == (own[name].dtype, own[name].shape)


def test_the_module_loads_it_and_keeps_what_was_not_shared(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    layout = ParameterLayout(module, share="0.*")
    write_vector(tmp_path / "m.safetensors", np.ones(layout.size, np.float32), layout.specs)
    missing, unexpected = module.load_state_dict(
        safetensors.torch.load_file(tmp_path / "m.safetensors"), strict=False
    )
    assert not unexpected and all(name.startswith("1.") for name in missing)
    assert torch.all(module[0].weight == 1)  # type: ignore[arg-type]


def test_values_beyond_a_dtype_are_infinite_as_in_the_module(tmp_path: Path) -> None:
    specs = (ParameterSpec("half", (2,), "float16"),)
    write_vector(tmp_path / "m.safetensors", np.array([1e6, -1], np.float32), specs)
    np.testing.assert_array_equal(
        read_vector(tmp_path / "m.safetensors", specs), np.array([np.inf, -1], np.float32)
    )


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_it_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_vector(tmp_path / "m.safetensors", VECTOR, SPECS)
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("mine")
    assert "is there already" in refusal(path) and "overwrite=true" in refusal(path)
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    assert "is there already" in refusal(tmp_path / "link.safetensors")
    write_vector(path, VECTOR, SPECS, overwrite=True)
    np.testing.assert_array_equal(read_vector(path, SPECS)[:6], VECTOR[:6])


@pytest.mark.parametrize("appears", [False, True])
def test_what_fails_half_way_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appears: bool
) -> None:
    path = tmp_path / "m.safetensors"

    def save_file(tensors: object, partial: Path, metadata: object) -> None:
        if appears:
            path.write_text("another's")
        else:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(ConfigurationError, match="is there already" if appears else "No space left"):
        write_vector(path, VECTOR, SPECS)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == (["another's"] if appears else [])


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    assert "must end in .safetensors" in refusal(tmp_path / "model.pt")
    assert "there is no directory" in refusal(tmp_path / "missing" / "m.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    assert "is a directory" in refusal(tmp_path / "d.safetensors")
    assert "(9,)" in refusal(tmp_path / "m.safetensors", VECTOR[:9])
    odd = (ParameterSpec("b", (10,), "float5"),)
    assert "parameter 'b' has the dtype 'float5'" in refusal(tmp_path / "m.safetensors", specs=odd)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for read in (lambda: read_vector(path, SPECS), lambda: require_tensor_file(path)):
        with pytest.raises(ConfigurationError, match="cannot be read as a safetensors file"):
            read()
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(ConfigurationError, match="cannot be read as a safetensors file"):
        require_tensor_file(path)
    write_vector(path, VECTOR, SPECS, overwrite=True)
    require_tensor_file(path)
    for wrong, found in ((ParameterSpec("c", (4,), "float32"), "nothing"), (SPECS[1], r"\[4\]")):
        spec = ParameterSpec(wrong.name, (2, 2), wrong.dtype)
        with pytest.raises(ConfigurationError, match=rf"of shape \[2, 2\]; found {found}"):
            read_vector(path, [spec])
