"""Sparse vectors between a GPU and the host."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.devices import packed, to_device, to_host, unpacked

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(0, 2**40), st.floats(width=32, allow_nan=False)), max_size=30))
def test_packing_keeps_every_bit(entries: list[tuple[int, float]]) -> None:
    indices = torch.tensor([index for index, _ in entries], dtype=torch.int64)
    values = torch.tensor([value for _, value in entries], dtype=torch.float32)
    both = packed(indices, values)
    assert both.dtype == torch.int32 and both.shape == (3 * len(entries),)
    assert all(map(torch.equal, unpacked(both), (indices, values)))


def test_strided_parts_of_other_tensors_are_packed_too() -> None:
    indices, values = torch.arange(10)[::2], torch.arange(10.0)[::2]
    assert all(map(torch.equal, unpacked(packed(indices, values)), (indices, values)))


def test_on_the_host_nothing_is_copied() -> None:
    indices, values = torch.arange(3), torch.ones(3)
    sent_indices, sent_values = to_host(indices, values)
    assert sent_indices.ctypes.data == indices.data_ptr() and sent_values.ctypes.data == values.data_ptr()
    got_indices, got_values = to_device(sent_indices, sent_values, CPU)
    assert got_indices is not None
    assert got_indices.data_ptr() == indices.data_ptr() and got_values.data_ptr() == values.data_ptr()
    assert to_device(None, np.ones(3, np.float32), CPU)[0] is None


def test_between_devices_one_tensor_travels() -> None:
    """On the meta device, which keeps no values: its shapes and types tell."""
    indices, values = to_device(np.arange(4), np.ones(4, np.float32), torch.device("meta"))
    assert indices is not None and indices.device.type == values.device.type == "meta"
    assert indices.dtype == torch.int64 and values.dtype == torch.float32
    assert indices.shape == values.shape == (4,)
    assert indices.untyped_storage()._cdata == values.untyped_storage()._cdata
