"""Releases and participants with error feedback, and uploads that fail as they are told to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ppdl import errors
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.participant import Participant
from lightning_ppdl.privacy.release import PlainRelease, Release
from lightning_ppdl.privacy.residual import Residual
from lightning_ppdl.records import Manifest, ParameterSpec, Quantity, Receipt, SparseUpdate, ValueType
from lightning_ppdl.selection import ErrorFeedback, LargestValues, Selection
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.merge import Add

SIZE = 10
SPECS = (ParameterSpec("a", (6,), "float32"), ParameterSpec("b", (4,), "float32"))
FIFTH = ErrorFeedback(LargestValues(0.2), ahead=0.0)
RAMP = torch.arange(10.0)
_numbers = itertools.count()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(release: Release) -> Residual:
    assert release.residual is not None
    return release.residual


def send(release: Release, delta: Tensor, seed: int = 0) -> Tensor:
    """Release ``delta`` and send all of it: what was sent, as float32 (P,)."""
    released = release.release(delta, generator(seed))
    update = SparseUpdate("anna", 1, 0, released.indices.numpy(), released.values.numpy())
    kept(release).sent(update)
    sent = torch.zeros_like(delta)
    sent[released.indices] = released.values
    return sent


def entries(**changes: float) -> Tensor:
    """A vector of zeros but for e.g. ``_3=1.0``."""
    vector = torch.zeros(SIZE)
    for index, value in changes.items():
        vector[int(index[1:])] = value
    return vector


class LossyBackend(MemoryBackend):
    """Answers the next uploads with these errors, before they reach the server (or after it)."""

    failures: list[Exception] = []  # noqa: RUF012
    after = False

    def upload(self, message: bytes) -> Receipt:
        if self.failures and self.after:
            super().upload(message)
        if self.failures:
            raise self.failures.pop(0)
        return super().upload(message)

    def take_turn(self, timeout_seconds: float) -> None:
        if self.failures and str(self.failures[0]) == "no turn":
            raise self.failures.pop(0)
        super().take_turn(timeout_seconds)


def participant(
    server: ParameterServer,
    name: str = "anna",
    selection: Selection = FIFTH,
    bound: float | None = None,
    join: bool = True,
    quantity: Quantity = "change",
    dtype: ValueType = "float32",
    download_fraction: float = 1.0,
) -> Participant:
    release = PlainRelease(selection, bound).for_tensors(SPECS)
    manifest = Manifest(SPECS, quantity, release.max_fraction(SIZE), bound)
    backend = LossyBackend(f"memory://feedback-{next(_numbers)}", server)
    backend.failures = []
    made = Participant(
        name,
        backend,
        manifest,
        release,
        download_fraction,
        turn_timeout_seconds=5.0,
        on_unreachable="local",
        dtype=dtype,
    )
    if join:
        made.join()
    return made


@pytest.fixture
def server() -> ParameterServer:
    return ParameterServer(merge=Add(), initial=np.zeros(SIZE, np.float32))


def fail(member: Participant, *failures: Exception, after: bool = False) -> None:
    backend = member._exchange.backend
    assert isinstance(backend, LossyBackend)
    backend.failures, backend.after = list(failures), after


def play(member: Participant, change: Tensor) -> Tensor:
    """One round whose training adds ``change``; returns where it started."""
    start = member.begin_round(torch.zeros(SIZE))
    assert start is not None
    member.end_round(start + change)
    return start


def due(member: Participant) -> list[float]:
    values = member.state_dict()["release"]
    return [0.0] * SIZE if values is None else values.tolist()


LOST = [
    errors.UploadLostError("it fell into the sea"),
    errors.TurnNotHeldError("the lease ran out"),
    errors.LateUpdateError("the cycle was closed"),
]
