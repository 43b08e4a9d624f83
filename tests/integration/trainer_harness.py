"""What tests of participants in Trainers look with: at hooks, at the server, and beside plain training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from strategy_harness import (
    Ends,
    Tiny,
    add_server,
    everything,
    flat,
    loader,
    require_close,
    rounds,
    trainer,
)

from lightning_ppdl import DSSGDStrategy, LargestValues, ParameterServer, RoundRobin
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.records import DownloadRequest, Manifest, Membership, Receipt

PATIENCE_SECONDS = 5.0
"""For a turn that nobody else has."""


class At(Callback):
    """Calls ``look(trainer, module)`` at every hook of one name; what it returned is in ``seen``."""

    def __init__(self, hook: str, look: Callable[[Any, Any], Any]) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda made, module, *_, **__: self.seen.append(look(made, module)))


class Calls(MemoryBackend):
    """A connection that notes what is asked of the server."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.made: list[str] = []

    def join(self, participant: str, manifest: Manifest) -> Membership:
        self.made.append("join")
        return super().join(participant, manifest)

    def take_turn(self, timeout_seconds: float) -> None:
        self.made.append("take_turn")
        super().take_turn(timeout_seconds)

    def end_turn(self) -> None:
        self.made.append("end_turn")
        super().end_turn()

    def download(self, request: DownloadRequest) -> bytes:
        self.made.append("download")
        return super().download(request)

    def upload(self, message: bytes) -> Receipt:
        self.made.append("upload")
        return super().upload(message)


def watched(calls: Calls, fraction: float = 1.0, **settings: Any) -> DSSGDStrategy:
    """The strategy of anna, whose calls are noted."""
    settings = {"initial": "own", "turn_timeout_seconds": PATIENCE_SECONDS, **settings}
    return DSSGDStrategy(calls, "anna", LargestValues(fraction), **settings)


@dataclass(frozen=True)
class Run:
    """A Trainer and the module that it trained."""

    trainer: pl.Trainer
    module: Tiny

    @property
    def lr(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])


@dataclass(frozen=True)
class Shared(Run):
    """Also the server, and the optimizer steps at which rounds ended."""

    server: ParameterServer
    ends: list[int]

    @property
    def rounds(self) -> int:
        return len(rounds(self.trainer))


def both() -> dict[str, Any]:
    return {"train_dataloaders": loader(), "val_dataloaders": loader(2)}


def run(
    strategy: Any = "auto",
    callbacks: Callable[[], list[Callback]] = list,
    data: Callable[[], dict[str, Any]] = both,
    module: Callable[[], Tiny] = Tiny,
    epochs: int | None = 3,
    **settings: Any,
) -> Run:
    """One ``fit()``, of everything made anew; ``settings`` are the Trainer's."""
    pl.seed_everything(7, verbose=False)
    made, tiny = trainer(strategy, epochs, callbacks=callbacks(), **settings), module()
    made.fit(tiny, **data())
    return Run(made, tiny)


def require_plain(
    url: str,
    own: dict[str, Any] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
    averaged: bool = False,
    **settings: Any,
) -> Shared:
    """Train without the strategy, and then with it, alone at a server that everything is shared with.

    Nothing may differ, the server must have what was trained, and the participant must be gone.

    Args:
        url: Where the server is put.
        own: Settings of the strategy.
        callbacks: As for :func:`run`.
        averaged: The module ends with something else than what was trained, so the server has not got it.
        settings: For :func:`run`.
    """
    plain = run(callbacks=callbacks, **settings)
    server = add_server(url, protocol=RoundRobin(), lease_seconds=1000.0)
    ends = Ends(url)
    strategy = everything(url, turn_timeout_seconds=PATIENCE_SECONDS, **(own or {}))
    alone = run(strategy, lambda: [*callbacks(), ends], **settings)
    assert alone.trainer.global_step == plain.trainer.global_step > 0
    assert alone.trainer.current_epoch == plain.trainer.current_epoch
    assert alone.lr == plain.lr
    require_close(flat(alone.module), flat(plain.module))
    if not averaged:
        require_close(server.parameters(), flat(alone.module))
    require_left(server, len(ends.steps))
    assert [report.round for report in rounds(alone.trainer)] == list(range(1, len(ends.steps) + 1))
    return Shared(alone.trainer, alone.module, server, ends.steps)


def require_left(server: ParameterServer, shared: int, name: str = "anna") -> None:
    """``name`` is gone, holds no turn, and has shared so many rounds; nothing was refused."""
    status = server.status()
    (member,) = [member for member in status.members if member.name == name]
    assert (member.present, member.rounds, status.awaited) == (False, shared, ()), status
    assert status.rejections == {}, status


def require_free(url: str, name: str = "ben") -> None:
    """Somebody else gets the turn at once, and shares a round."""
    other = run(everything(url, name, turn_timeout_seconds=0.5), epochs=1, limit_train_batches=1)
    assert [report.merged for report in rounds(other.trainer)] == [True]
