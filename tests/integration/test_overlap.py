"""Exchanges that go on while the next round's first steps are made."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from strategy_harness import (
    BATCHES,
    Tiny,
    add_server,
    everything,
    fit,
    flat,
    loader,
    require_close,
    rounds,
    trainer,
    url,
)

from lightning_ppdl import Add, Asynchronous, ConfigurationError, ParameterServer, RoundRobin
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.records import Receipt

__all__ = ["url"]


class Gated(MemoryBackend):
    """Uploads only once training has gone on."""

    def __init__(self, url: str, server: ParameterServer) -> None:
        super().__init__(url, server)
        self.gate = threading.Event()

    def upload(self, message: bytes) -> Receipt:
        assert self.gate.wait(20), "training waited for the upload"
        self.gate.clear()
        return super().upload(message)


class Opens(pl.Callback):
    """Opens the gate after some steps of each round but the first, and when training is about to end."""

    def __init__(self, backend: Gated, steps: int) -> None:
        self._backend, self._steps = backend, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if (step > BATCHES and step % BATCHES == self._steps) or step == 3 * BATCHES:
            self._backend.gate.set()


def asynchronous(url: str) -> ParameterServer:
    return add_server(url, protocol=Asynchronous())


@pytest.mark.parametrize("overlap", [1, 3, BATCHES, 2 * BATCHES])
@pytest.mark.parametrize("quantity", ["change"])
def test_alone_it_is_plain_training(url: str, overlap: int, quantity: Any) -> None:
    server = asynchronous(url)
    module, plain = Tiny(), Tiny()
    made = fit(module, everything(url, overlap_steps=overlap), epochs=4)
    fit(plain, epochs=4)
    require_close(flat(module), flat(plain))
    require_close(server.parameters(), flat(module))
    assert [report.round for report in rounds(made)] == [1, 2, 3, 4]
    assert all(report.merged and report.uploaded_bytes for report in rounds(made))


def test_training_does_not_wait_for_the_upload(url: str) -> None:
    server = ParameterServer(merge=Add(), protocol=Asynchronous())
    backend = Gated(url, server)
    module = Tiny()
    strategy = everything(backend, overlap_steps=3)  # type: ignore[arg-type]
    made = fit(module, strategy, callbacks=[Opens(backend, 2)])
    assert server.status().uploads == 3 and len(rounds(made)) == 3
    require_close(server.parameters(), flat(module))


def test_what_others_did_meanwhile_is_laid_under_the_steps(url: str) -> None:
    """Two that train at once, each ahead of what it downloads: nothing of either is lost or counted twice."""
    server = asynchronous(url)
    modules = {"anna": Tiny(), "ben": Tiny()}
    before: dict[str, Any] = {}

    def run(name: str) -> None:
        before[name] = trainer(everything(url, name, overlap_steps=2), epochs=3)
        before[name].fit(modules[name], loader(len(name)))

    run("anna")
    alone = server.parameters()
    run("ben")
    # Ben started from Anna's, and what he added is what he has.
    require_close(server.parameters(), flat(modules["ben"]))
    assert abs(server.parameters() - alone).max() > 1e-3
    assert server.status().uploads == 6


def test_validation_and_checkpoints_between_rounds(url: str, tmp_path: Path) -> None:
    server = asynchronous(url)
    module = Tiny()
    made = trainer(everything(url, overlap_steps=2), epochs=2)
    made.fit(module, loader(), loader(1))
    made.save_checkpoint(tmp_path / "kept.ckpt")
    again = trainer(everything(url, overlap_steps=2), epochs=4)
    again.fit(module, loader(), loader(1), ckpt_path=str(tmp_path / "kept.ckpt"))
    plain = Tiny()
    fit(plain, epochs=4)
    require_close(flat(module), flat(plain))
    assert server.status().uploads == 4


def test_a_server_that_gives_turns_refuses_it(url: str) -> None:
    add_server(url, protocol=RoundRobin())
    with pytest.raises(ConfigurationError, match=r"overlap_steps at 0, or serve protocol=asynchronous"):
        fit(Tiny(), everything(url, overlap_steps=2))


def test_it_is_a_number_of_steps(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"overlap_steps=-1"):
        everything(url, overlap_steps=-1)


def test_an_error_while_one_is_on_its_way_ends_clean(url: str) -> None:
    server = asynchronous(url)

    class Failing(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == BATCHES + 1:
                raise RuntimeError("out of memory")

    strategy = everything(url, overlap_steps=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Tiny(), strategy, callbacks=[Failing()])
    assert server.status().uploads == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("courier")]
