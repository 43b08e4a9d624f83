"""Random generators in checkpoints: Lightning saves none, and without them a resumed run is another run."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


def generators_state(device: torch.device, loaders: Iterable[object]) -> dict[str, Any]:
    """The global generators, and those that train loaders draw their order from: tensors and primitives.

    Args:
        device: Where training happens; a GPU has a generator of its own.
        loaders: The train loaders, in order.
    """
    version, internal, spare = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), spare],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "loaders": [None if (own := _own(loader)) is None else own.get_state() for loader in loaders],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: dict[str, Any], device: torch.device) -> None:
    """Put the global generators back."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, spare = state["python"]
    random.setstate((version, tuple(internal), spare))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"])}})
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def restore_loader(state: dict[str, Any], position: int, loader: object) -> None:
    """Put the generator of the train loader at ``position`` back, if it had one of its own then and now."""
    own = _own(loader)
    kept = state["loaders"]
    if own is not None and position < len(kept) and kept[position] is not None:
        own.set_state(kept[position].cpu())


def _own(loader: object) -> torch.Generator | None:
    """The generator that a loader's user gave it."""
    for holder in (loader, getattr(loader, "sampler", None)):
        if isinstance(own := getattr(holder, "generator", None), torch.Generator):
            return own
    return None
