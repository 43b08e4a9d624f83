"""Error feedback and quotas through real Trainers: each participant keeps its own, checkpoints too."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from simulation_harness import make
from strategy_harness import Tiny, add_server, everything, fit, flat, loader, rounds, trainer, url
from torch import Tensor

from lightning_ppdl import (
    DSSGDCallback,
    DSSGDStrategy,
    ErrorFeedback,
    LargestValues,
    PerLayer,
    RoundRobin,
    Selection,
)
from lightning_ppdl.errors import ConfigurationError, JoinRefusedError
from lightning_ppdl.privacy.events import PrivateSteps
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.simulation import simulate

__all__ = ["url"]

SIZE = 34  # of Tiny: 24 of its backbone, 10 of its head
START = np.random.default_rng(0).normal(0, 0.5, SIZE).astype(np.float32)


class Watched(Tiny):
    """Knows what its own training has changed, over all rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = torch.zeros(SIZE)
        self._started: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self._started = flat(self)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.is_last_batch:
            assert self._started is not None
            self.changed += flat(self) - self._started


def due(made: pl.Trainer) -> Tensor:
    """What a participant's Trainer keeps for later rounds."""
    (callback,) = [c for c in made.callbacks if isinstance(c, DSSGDCallback)]  # type: ignore[attr-defined]
    state = callback.state_dict()["participant"]
    assert state is not None and isinstance(state["release"], Tensor)
    return state["release"]


@pytest.mark.parametrize("inner", [LargestValues(0.1), PerLayer(LargestValues(0.2))])
def test_two_participants_share_a_configuration_and_no_residual(url: str, inner: Selection) -> None:
    server = add_server(url, initial=START, protocol=RoundRobin(), members=["anna", "ben"])
    shared = ErrorFeedback(inner)
    modules = {"anna": Watched(), "ben": Watched()}
    trainers = {
        name: trainer(DSSGDStrategy(url, name, selection=shared, turn_timeout_seconds=30.0), epochs=4)
        for name in modules
    }
    threads = [
        threading.Thread(target=trainers[name].fit, args=(modules[name], loader(seed)), daemon=True)
        for seed, name in enumerate(modules)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert server.status().uploads == 8
    residuals = {name: due(made) for name, made in trainers.items()}
    assert not torch.equal(residuals["anna"], residuals["ben"])
    assert all(float(residual.abs().max()) > 1e-4 for residual in residuals.values())
    both = sum(module.changed for module in modules.values())
    together = torch.from_numpy(server.parameters() - START) + residuals["anna"] + residuals["ben"]
    torch.testing.assert_close(together, both, rtol=1e-4, atol=1e-5)
    for made in trainers.values():
        assert all(report.released_values <= 6 for report in rounds(made))


@pytest.mark.parametrize("keep", [True, False])
def test_resuming_from_a_checkpoint_keeps_the_residual(url: str, tmp_path: Path, keep: bool) -> None:
    def strategy(address: str) -> DSSGDStrategy:
        return everything(address, selection=ErrorFeedback(LargestValues(0.1)))

    whole, module = Tiny(), Tiny()
    fit(whole, strategy(f"{url}-whole"), epochs=4)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    made = fit(Tiny(), strategy(url), epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    state = saved["callbacks"]["DSSGDCallback"]["participant"]
    assert torch.equal(state["release"], due(made))
    if not keep:
        # A checkpoint from before there was error feedback.
        del state["release"]
        torch.save(saved, path)
    resumed = trainer(strategy(url), epochs=4)
    resumed.fit(module, loader(), ckpt_path=str(path))
    assert [report.round for report in rounds(resumed)] == [3, 4]
    assert torch.equal(flat(module), flat(whole)) is keep


def test_a_further_fit_goes_on_with_the_residual(url: str) -> None:
    def strategy(address: str) -> DSSGDStrategy:
        return everything(address, selection=ErrorFeedback(LargestValues(0.1)))

    whole, parted = Tiny(), Tiny()
    expected = fit(whole, strategy(f"{url}-whole"), epochs=4)
    made = fit(parted, strategy(url), epochs=2)
    made.fit_loop.max_epochs = 4
    made.fit(parted, loader())
    assert torch.equal(due(made), due(expected)) and torch.equal(flat(parted), flat(whole))


def test_quotas_are_declared_and_kept(url: str) -> None:
    server = add_server(url, initial=START)
    # 6 of the backbone's 24 entries, and half of the head's 10.
    selection = PerLayer(LargestValues(0.25), {"head.*": 0.5})
    made = fit(Tiny(), DSSGDStrategy(url, "anna", selection=selection), epochs=1)
    assert rounds(made)[0].released_values == 11
    changed = server.parameters() != START
    assert (int(changed[:24].sum()), int(changed[24:].sum())) == (6, 5)
    add_server(f"{url}-strict", upload_fraction=10 / SIZE)
    with pytest.raises(JoinRefusedError, match=r"0\.32"):
        fit(Tiny(), DSSGDStrategy(f"{url}-strict", "anna", selection=selection))


def test_a_pattern_that_matches_nothing_is_refused_before_anything_leaves(url: str) -> None:
    server = add_server(url)
    with pytest.raises(ConfigurationError, match=r"'hed\.\*' matches none of backbone\.weight"):
        fit(Tiny(), DSSGDStrategy(url, "anna", selection=PerLayer(fractions={"hed.*": 0.5})))
    assert server.status().members == ()


@pytest.mark.parametrize(
    "privacy", [ParticipantLevel(noise_multiplier=1.0, delta=1e-5), SparseVector(epsilon=2.0, fraction=0.2)]
)
def test_beside_noise_at_the_door_it_is_refused_before_anything_leaves(url: str, privacy: Mechanism) -> None:
    server = add_server(url, initial=START)
    strategy = DSSGDStrategy(
        url,
        "anna",
        selection=ErrorFeedback(),
        privacy=privacy,
        ledger=Ledger(None),
        noise=SeededNoise(1, simulated=True),
    )
    with pytest.raises(ConfigurationError, match=r"selection=ErrorFeedback\("):
        fit(Tiny(), strategy)
    assert server.version == 0 and server.status().members == ()


def test_beside_private_steps_it_costs_what_they_cost_without_it(url: str) -> None:
    spent: list[list[int]] = []
    for selection in (LargestValues(0.1), ErrorFeedback(LargestValues(0.1))):
        ledger = Ledger(None)
        strategy = DSSGDStrategy(
            f"{url}-{len(spent)}",
            "anna",
            selection=selection,
            privacy=RecordLevel(noise_multiplier=1.0, clip=1.0, delta=1e-3),
            ledger=ledger,
            noise=SeededNoise(1, simulated=True),
        )
        made = fit(Tiny(), strategy, epochs=3)
        assert [report.released_values for report in rounds(made)] == [3, 3, 3]
        spent.append([event.steps for event in ledger.events() if isinstance(event, PrivateSteps)])
    assert spent[0] == spent[1] == [6, 6, 6]
    assert float(due(made).abs().max()) > 0


def test_a_simulation_says_at_once_what_is_wrong_with_a_pattern() -> None:
    with pytest.raises(ConfigurationError, match=r"'hed\.\*' matches none"):
        simulate(make(selection=PerLayer(LargestValues(0.2), {"hed.*": 0.5})))
