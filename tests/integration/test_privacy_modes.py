"""The strategy with a privacy mechanism: paid before sent, refused where unsound, ended at the budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from strategy_harness import (
    BATCHES,
    Tiny,
    add_server,
    fit,
    flat,
    loader,
    rounds,
    trainer,
    url,
)

from lightning_ppdl import DSSGDStrategy, LargestValues, RoundRobin
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    LedgerBehindError,
    LedgerWriteError,
    TaintedStateError,
)
from lightning_ppdl.privacy.accounting import total
from lightning_ppdl.privacy.events import GaussianRound, PrivateSteps, SparseVectorRound
from lightning_ppdl.privacy.ledger import Ledger, LedgerEntry
from lightning_ppdl.privacy.mechanism import Mechanism
from lightning_ppdl.privacy.noise import SeededNoise
from lightning_ppdl.privacy.participant_level import ParticipantLevel
from lightning_ppdl.privacy.record.record_level import RecordLevel
from lightning_ppdl.privacy.sparse_vector import SparseVector
from lightning_ppdl.records import Receipt

__all__ = ["url"]

SPARSE = SparseVector(epsilon=2.0, fraction=0.2)
GAUSSIAN = ParticipantLevel(noise_multiplier=1.0, clip=1.0, delta=1e-5)
RECORD = RecordLevel(noise_multiplier=1.0, clip=1.0, delta=1e-3)
EVERY = pytest.mark.parametrize("privacy", [SPARSE, GAUSSIAN, RECORD], ids=lambda m: m.name)


def private(url: Any, privacy: Mechanism, ledger: Any, **settings: Any) -> DSSGDStrategy:
    settings.setdefault("noise", SeededNoise(1, simulated=True))
    return DSSGDStrategy(url, "anna", privacy=privacy, ledger=ledger, **settings)


class Witness(MemoryBackend):
    """Keeps each message that is sent, and what the ledger held at that moment."""

    def __init__(self, url: str, ledger: Ledger) -> None:
        super().__init__(url)
        self.sent: list[bytes] = []
        self.entries_when_sent: list[int] = []
        self._ledger = ledger
        self.die_at: int | None = None

    def upload(self, message: bytes) -> Receipt:
        self.entries_when_sent.append(len(list(self._ledger.events())))
        if self.die_at == len(self.entries_when_sent):
            raise OSError("killed")
        self.sent.append(message)
        return super().upload(message)


@EVERY
def test_each_round_is_paid_before_it_leaves(url: str, privacy: Mechanism) -> None:
    add_server(url)
    ledger = Ledger(None)
    backend = Witness(url, ledger)
    fit(Tiny(), private(backend, privacy, ledger), epochs=3)
    assert backend.entries_when_sent == [1, 2, 3]
    kinds = {SPARSE.name: SparseVectorRound, GAUSSIAN.name: GaussianRound, RECORD.name: PrivateSteps}
    assert all(isinstance(event, kinds[privacy.name]) for event in ledger.events())


def test_what_is_charged_is_what_the_mechanism_costs(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)
    fit(Tiny(), private(url, SPARSE, ledger), epochs=3)
    assert total(ledger.events(), 0.0).epsilon == pytest.approx(6.0)


def test_all_private_steps_are_charged(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)
    done = fit(Tiny(), private(url, RECORD, ledger), epochs=2)
    steps = sum(event.steps for event in ledger.events() if isinstance(event, PrivateSteps))
    assert steps == done.global_step == 2 * BATCHES


def test_private_steps_that_end_in_an_error_are_charged_too(url: str) -> None:
    class Failing(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step == 4:
                raise RuntimeError("a broken batch")
            return super().training_step(batch, batch_idx)

    add_server(url)
    ledger = Ledger(None)
    with pytest.raises(RuntimeError, match="a broken batch"):
        fit(Failing(), private(url, RECORD, ledger))
    assert [event.steps for event in ledger.events() if isinstance(event, PrivateSteps)] == [4]


@EVERY
def test_huge_noise_destroys_what_is_shared(url: str, privacy: Mechanism) -> None:
    """The control: with next to no noise the shared parameters learn the task, with huge noise they don't."""

    def loss(mechanism: Mechanism, address: str) -> float:
        server = add_server(address)
        module = Tiny()
        fit(module, private(address, mechanism, Ledger(None)), epochs=6)
        with torch.no_grad():
            offset = 0
            vector = torch.from_numpy(server.parameters())
            for parameter in module.parameters():
                parameter.copy_(vector[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()
            x, y = next(iter(loader(seed=5, batches=50)))
            return float(torch.nn.functional.mse_loss(module(x), y))

    quiet: dict[str, Mechanism] = {
        SPARSE.name: SparseVector(epsilon=1e7, fraction=1.0, bound=1.0, threshold=0.0),
        GAUSSIAN.name: ParticipantLevel(noise_multiplier=1e-4, clip=1.0, delta=1e-5),
        RECORD.name: RecordLevel(noise_multiplier=0.02, clip=1.0, delta=1e-3),
    }
    loud: dict[str, Mechanism] = {
        SPARSE.name: SparseVector(epsilon=0.01, fraction=1.0, bound=1.0, threshold=0.0),
        GAUSSIAN.name: ParticipantLevel(noise_multiplier=100.0, clip=1.0, delta=1e-5),
        RECORD.name: RecordLevel(noise_multiplier=1000.0, clip=1.0, delta=1e-3),
    }
    assert loss(quiet[privacy.name], f"{url}-quiet") < 0.3
    assert loss(loud[privacy.name], f"{url}-loud") > 10


@pytest.mark.parametrize(("max_epsilon", "expected"), [(2.0, 1), (4.5, 2), (100.0, 5)])
def test_training_ends_at_the_budget(url: str, max_epsilon: float, expected: int) -> None:
    add_server(url)
    ledger = Ledger(None)
    budgeted = SparseVector(epsilon=2.0, fraction=0.2, max_epsilon=max_epsilon)
    done = fit(Tiny(), private(url, budgeted, ledger), epochs=5)
    assert len(rounds(done)) == expected == done.current_epoch
    assert total(ledger.events(), 0.0).epsilon <= max_epsilon


def test_private_steps_end_at_the_budget_in_the_middle_of_a_round(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)
    free = PrivateSteps(RECORD.noise_multiplier or 0.0, 1 / BATCHES, RECORD.clip, steps=8)
    budget = total([free], 1e-3).epsilon * 1.0001
    budgeted = RecordLevel(noise_multiplier=1.0, clip=1.0, delta=1e-3, max_epsilon=budget)
    done = fit(Tiny(), private(url, budgeted, ledger), epochs=5)
    assert done.global_step == 8
    assert total(ledger.events(), 1e-3).epsilon <= budget
    assert [report.round for report in rounds(done)] == [1, 2]


def test_a_spent_budget_refuses_to_begin(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)
    budgeted = SparseVector(epsilon=2.0, fraction=0.2, max_epsilon=4.0)
    fit(Tiny(), private(url, budgeted, ledger), epochs=5)
    with pytest.raises(BudgetExhaustedError, match=r"max_epsilon=4\.0.*epsilon 4"):
        fit(Tiny(), private(url, budgeted, ledger), epochs=5)


def test_a_spent_budget_may_let_training_go_on_alone(url: str) -> None:
    server = add_server(url)
    ledger = Ledger(None)
    alone = SparseVector(epsilon=2.0, fraction=0.2, max_epsilon=2.0, on_exhausted="local")
    with pytest.warns(UserWarning, match="goes on without exchanging"):
        done = fit(Tiny(), private(url, alone, ledger), epochs=4)
    assert done.current_epoch == 4 and len(rounds(done)) == 1
    assert server.status().uploads == 1


def test_what_was_trained_without_noise_is_never_released_again(url: str, tmp_path: Path) -> None:
    add_server(url)
    ledger = Ledger(None)
    free = PrivateSteps(1.0, 1 / BATCHES, 1.0, steps=BATCHES)
    budget = total([free], 1e-3).epsilon * 1.0001
    limited = RecordLevel(
        noise_multiplier=1.0, clip=1.0, delta=1e-3, max_epsilon=budget, on_exhausted="local"
    )
    module = Tiny()
    with pytest.warns(UserWarning, match="goes on without exchanging"):
        done = fit(module, private(url, limited, ledger), epochs=2)
    done.save_checkpoint(tmp_path / "tainted.ckpt")
    again = trainer(private(url, RECORD, ledger), epochs=4)
    with pytest.raises(TaintedStateError, match="without noise"):
        again.fit(Tiny(), loader(), ckpt_path=str(tmp_path / "tainted.ckpt"))


def test_a_release_that_was_paid_and_not_sent_is_sent_after_the_restart(url: str, tmp_path: Path) -> None:
    add_server(url)
    path = tmp_path / "anna.ledger"
    ledger = Ledger(path)
    backend = Witness(url, ledger)
    backend.die_at = 2
    with pytest.raises(OSError, match="killed"):
        fit(Tiny(), private(backend, SPARSE, ledger, noise=None), epochs=3)
    ledger.close()
    ledger = Ledger(path)
    after = Witness(url, ledger)
    done = fit(Tiny(), private(after, SPARSE, ledger, noise=None), epochs=2)
    # The bytes of the second round, then two new rounds; four paid in all.
    assert len(after.sent) == 3 and len(list(ledger.events())) == 4
    assert [report.round for report in rounds(done)] == [3, 4]
    ledger.close()


def test_a_ledger_that_knows_less_than_the_server_is_refused(url: str) -> None:
    add_server(url)
    fit(Tiny(), private(url, SPARSE, Ledger(None)), epochs=2)
    with pytest.raises(LedgerBehindError, match="anna"):
        fit(Tiny(), private(url, SPARSE, Ledger(None)), epochs=2)


def test_nothing_is_sent_when_the_ledger_cannot_be_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = add_server(url)

    def full(*_: Any) -> None:
        raise LedgerWriteError("the disk is full")

    monkeypatch.setattr(Ledger, "record", full)
    with pytest.raises(LedgerWriteError):
        fit(Tiny(), private(url, SPARSE, Ledger(None)))
    assert server.status().uploads == 0


def test_steps_stay_unpaid_until_the_ledger_took_them(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_server(url)
    record = Ledger.record
    refused: list[Any] = []

    def full_once(ledger: Ledger, entry: Any, message: bytes | None = None) -> None:
        if not refused:
            refused.append(entry)
            raise LedgerWriteError("the disk is full")
        record(ledger, entry, message)

    monkeypatch.setattr(Ledger, "record", full_once)
    ledger = Ledger(None)
    with pytest.raises(LedgerWriteError):
        fit(Tiny(), private(url, RECORD, ledger))
    assert [event.steps for event in ledger.events() if isinstance(event, PrivateSteps)] == [BATCHES]


def test_a_ledger_that_fails_at_the_end_frees_the_turn_and_the_ledger(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = add_server(url, protocol=RoundRobin())
    ledger = Ledger(None)

    class Failing(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trainer.global_step == 2:
                monkeypatch.setattr(Ledger, "record", full)
                raise RuntimeError("a broken batch")
            return super().training_step(batch, batch_idx)

    def full(*_: Any) -> None:
        raise LedgerWriteError("the disk is full")

    with pytest.raises(LedgerWriteError):
        fit(Failing(), private(url, RECORD, ledger))
    monkeypatch.undo()
    assert not any(member.present for member in server.status().members)
    fit(Tiny(), DSSGDStrategy(url, "berta", privacy=SPARSE, ledger=ledger), epochs=1)


def test_a_refused_selection_leaves_the_ledger_free(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)
    with pytest.raises(ConfigurationError, match="selects none"):
        fit(Tiny(), private(url, GAUSSIAN, ledger, selection=LargestValues(1e-6)))
    fit(Tiny(), private(url, GAUSSIAN, ledger), epochs=1)


def test_the_spend_is_logged(url: str, tmp_path: Path) -> None:
    add_server(url)
    logger = CSVLogger(tmp_path, version=0)
    budgeted = SparseVector(epsilon=2.0, fraction=0.2, max_epsilon=10.0)
    fit(Tiny(), private(url, budgeted, Ledger(None)), epochs=2, logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    table = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert [float(row["ppdl/epsilon"]) for row in table if row["ppdl/epsilon"]] == [2.0, 4.0]
    assert [float(row["ppdl/epsilon_remaining"]) for row in table if row["ppdl/epsilon"]] == [8.0, 6.0]


def test_runs_without_a_mechanism_log_no_epsilon(url: str, tmp_path: Path) -> None:
    add_server(url)
    logger = CSVLogger(tmp_path, version=0)
    fit(Tiny(), DSSGDStrategy(url, "anna"), epochs=1, logger=logger, log_every_n_steps=1)
    assert "epsilon" not in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_simulated_noise_repeats_and_secret_noise_does_not(url: str) -> None:
    def parameters(number: int, noise: Any) -> Any:
        server = add_server(f"{url}-{number}")
        fit(Tiny(), private(f"{url}-{number}", GAUSSIAN, Ledger(None), noise=noise), epochs=1)
        return server.parameters()

    first = parameters(0, SeededNoise(3, simulated=True))
    np.testing.assert_array_equal(first, parameters(1, SeededNoise(3, simulated=True)))
    assert not np.array_equal(parameters(2, None), parameters(3, None))


@EVERY
def test_a_checkpoint_holds_no_state_of_the_noise(url: str, privacy: Mechanism, tmp_path: Path) -> None:
    add_server(url)
    done = fit(Tiny(), private(url, privacy, Ledger(None), noise=None), epochs=1)
    done.save_checkpoint(tmp_path / "last.ckpt")  # pickling a secret source would raise
    assert (tmp_path / "last.ckpt").exists()


class TestRecordLevelStartsFromNothingNoiseless:
    """What follows from training without noise is no post-processing of private steps."""

    def test_a_module_that_another_mechanism_trained(self, url: str) -> None:
        add_server(url)
        module = Tiny()
        fit(module, private(url, GAUSSIAN, Ledger(None)), epochs=1)
        with pytest.raises(TaintedStateError, match="new module"):
            fit(module, DSSGDStrategy(url, "berta", privacy=RECORD, ledger=Ledger(None)), epochs=1)

    def test_a_checkpoint_of_another_mechanism(self, url: str, tmp_path: Path) -> None:
        add_server(url)
        done = fit(Tiny(), private(url, GAUSSIAN, ledger := Ledger(None)), epochs=1)
        done.save_checkpoint(tmp_path / "gaussian.ckpt")
        again = trainer(private(url, RECORD, ledger), epochs=2)
        with pytest.raises(TaintedStateError, match="checkpoint"):
            again.fit(Tiny(), loader(), ckpt_path=str(tmp_path / "gaussian.ckpt"))

    def test_a_checkpoint_of_a_plain_trainer(self, url: str, tmp_path: Path) -> None:
        add_server(url)
        fit(Tiny()).save_checkpoint(tmp_path / "plain.ckpt")
        again = trainer(private(url, RECORD, Ledger(None)), epochs=5)
        with pytest.raises(TaintedStateError, match="checkpoint"):
            again.fit(Tiny(), loader(), ckpt_path=str(tmp_path / "plain.ckpt"))

    @pytest.mark.parametrize("mechanism", [None, GAUSSIAN], ids=["plain", "participant"])
    def test_a_checkpoint_that_was_only_looked_at(
        self, url: str, tmp_path: Path, mechanism: Mechanism | None
    ) -> None:
        """It leaves its parameters in the module."""
        add_server(url)
        strategy = "auto" if mechanism is None else private(url, mechanism, Ledger(None))
        fit(Tiny(), strategy, epochs=1).save_checkpoint(tmp_path / "other.ckpt")
        module = Tiny()
        again = trainer(private(url, RECORD, Ledger(None)), epochs=5)
        again.validate(module, loader(), ckpt_path=str(tmp_path / "other.ckpt"), verbose=False)
        with pytest.raises(TaintedStateError, match="checkpoint"):
            again.fit(module, loader())

    def test_its_own_checkpoint_is_welcome(self, url: str, tmp_path: Path) -> None:
        add_server(url)
        ledger = Ledger(None)
        fit(Tiny(), private(url, RECORD, ledger), epochs=1).save_checkpoint(tmp_path / "own.ckpt")
        again = trainer(private(url, RECORD, ledger), epochs=2)
        again.fit(Tiny(), loader(), ckpt_path=str(tmp_path / "own.ckpt"))
        assert [report.round for report in rounds(again)] == [2]

    def test_parameters_that_stay_local_are_named(self, url: str) -> None:
        add_server(url)
        with pytest.warns(UserWarning, match=r"2 trainable parameters, 'head.weight' first"):
            fit(Tiny(), private(url, RECORD, Ledger(None), share="backbone.*"), epochs=1)


def test_a_budget_does_not_go_with_a_least_number_of_epochs(url: str) -> None:
    add_server(url)
    budgeted = SparseVector(epsilon=2.0, fraction=0.2, max_epsilon=2.0)
    with pytest.raises(ConfigurationError, match="min_epochs=4"):
        fit(Tiny(), private(url, budgeted, Ledger(None)), epochs=5, min_epochs=4)


def test_two_participants_cannot_spend_out_of_one_ledger_at_once(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)

    class Nested(Tiny):
        def on_train_epoch_end(self) -> None:
            fit(Tiny(), DSSGDStrategy(url, "berta", privacy=SPARSE, ledger=ledger), epochs=1)

    with pytest.raises(ConfigurationError, match="in use by participant 'anna'"):
        fit(Nested(), private(url, SPARSE, ledger), epochs=1)
    fit(Tiny(), DSSGDStrategy(url, "berta", privacy=SPARSE, ledger=ledger), epochs=1)


def test_what_others_entered_in_the_ledger_counts_at_once(url: str) -> None:
    add_server(url)
    ledger, other = Ledger(None), Ledger(None)
    other.record(LedgerEntry.new("elsewhere", "anna", 1, SparseVectorRound(5.0, 1, 1, 1.0, 1.0, "paper")))

    class Merging(Tiny):
        def on_train_epoch_end(self) -> None:
            ledger.merge(other)

    budgeted = SparseVector(epsilon=2.0, fraction=0.2, max_epsilon=8.0)
    done = fit(Merging(), private(url, budgeted, ledger), epochs=5)
    assert len(rounds(done)) == 1
    assert total(ledger.events(), 0.0).epsilon == pytest.approx(7.0)


def test_the_plan_knows_that_max_steps_ends_training_early(url: str) -> None:
    add_server(url)
    ledger = Ledger(None)
    target = ParticipantLevel(epsilon=8.0, delta=1e-5, clip=1.0)
    fit(Tiny(), private(url, target, ledger), epochs=1000, max_steps=2 * BATCHES)
    assert 7.9 < total(ledger.events(), 1e-5).epsilon <= 8.0


class TestRefusals:
    def test_buffers_beside_private_steps(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="share_buffers='mean'"):
            private(url, RECORD, Ledger(None), share_buffers="mean")

    def test_seeded_noise_beside_a_ledger_on_disk(self, url: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="whoever knows its seed"):
            private(url, RECORD, tmp_path / "anna.ledger")

    def test_what_is_no_noise(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="noise='os'"):
            private(url, RECORD, Ledger(None), noise="os")

    def test_a_mechanism_without_a_ledger(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PPDL_LEDGER", raising=False)
        with pytest.raises(ConfigurationError, match=r"ledger is missing.*PPDL_LEDGER"):
            DSSGDStrategy(url, "anna", privacy=SPARSE)

    def test_a_ledger_without_a_mechanism(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="privacy"):
            DSSGDStrategy(url, "anna", ledger="anna.ledger")

    def test_what_is_no_mechanism(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="privacy='record'"):
            DSSGDStrategy(url, "anna", privacy="record", ledger=Ledger(None))  # type: ignore[arg-type]

    def test_un_noised_initial_parameters(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="initial='own'"):
            private(url, SPARSE, Ledger(None), initial="own")

    def test_a_selection_beside_a_mechanism_that_selects(self, url: str) -> None:
        add_server(url)
        with pytest.raises(ConfigurationError, match="selection"):
            fit(Tiny(), private(url, SPARSE, Ledger(None), selection=LargestValues(0.1)))


def test_the_strategy_can_be_made_again_from_its_ledgers_path(url: str, tmp_path: Path) -> None:
    """The path is opened for a fit() and free again after it."""
    add_server(url)
    path = tmp_path / "anna.ledger"
    before = flat(Tiny())
    module = Tiny()
    fit(module, private(url, SPARSE, path, noise=None), epochs=1)
    fit(copy.deepcopy(module), private(url, SPARSE, path, noise=None), epochs=1)
    with Ledger(path) as ledger:
        assert len(list(ledger.events())) == 2
    assert not torch.equal(before, flat(module))
