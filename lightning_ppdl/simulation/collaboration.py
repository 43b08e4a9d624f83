"""The collaborative part of a simulation: all participants' ``fit()`` calls under one scheduler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import pytorch_lightning as pl
import torch

from lightning_ppdl.data import ArrayDataset, Splits, loader
from lightning_ppdl.evaluation import Evaluator
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.models import Classifier
from lightning_ppdl.privacy.accounting import in_parallel, per_parameter_epsilon, total
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.privacy.release import PlainRelease
from lightning_ppdl.pytorch_lightning import DSSGDCallback, DSSGDStrategy
from lightning_ppdl.randomness import derive_seed, numpy_generator, torch_generator
from lightning_ppdl.records import Receipt
from lightning_ppdl.selection import LargestValues
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.simulation.link import SimulatedLink
from lightning_ppdl.simulation.results import PrivacySummary, Progress, RoundRow
from lightning_ppdl.simulation.scheduler import Scheduler
from lightning_ppdl.simulation.settings import Simulation

_URL = "memory://simulation"


def participant_name(index: int) -> str:
    """``participant-1`` for index 0."""
    return f"participant-{index + 1}"


class Collaboration:
    """Builds every participant, then runs them.

    Args:
        simulation: The settings.
        splits: The data.
        shares: Each participant's part of the training data.
        evaluator: Measures the server's parameters after each round.
    """

    def __init__(
        self,
        simulation: Simulation,
        splits: Splits,
        shares: Sequence[ArrayDataset],
        evaluator: Evaluator,
    ) -> None:
        self._simulation = simulation
        self._evaluator = evaluator
        self._scheduler = Scheduler()
        names = [participant_name(index) for index in range(len(shares))]
        first = simulation.make_module(splits)
        layout = ParameterLayout(first)
        self.parameters = layout.size
        if simulation.privacy is None:
            plain = LargestValues() if simulation.selection is None else simulation.selection
            PlainRelease(plain, simulation.bound).for_tensors(layout.specs).max_fraction(layout.size)
        self._callbacks: list[DSSGDCallback] = []
        self._ledgers: list[Ledger] = []
        self._server = ParameterServer(
            protocol=simulation.protocol,
            merge=simulation.merge,
            members=names,
            criterion=simulation.criterion,
            initial=layout.flatten().numpy(),
            seed=simulation.seed,
            clock=lambda: self._scheduler.now,
        )
        self.seconds = 0.0
        """Wall clock of :meth:`run`, evaluation excluded."""
        self._rows: list[RoundRow] = []
        self._staleness: list[int] = []
        self._merged_before_round = 0
        self._exchanged = 0
        self._bytes_before_round = (0, 0)
        self._round_started = 0.0
        for index, (name, share) in enumerate(zip(names, shares, strict=True)):
            module = first if index == 0 else simulation.make_module(splits)
            callback = DSSGDCallback()
            self._callbacks.append(callback)
            trainer = simulation.make_trainer(strategy=self._strategy(name, module), callbacks=[callback])
            self._add(name, module, trainer, share)

    def run(self, progress: Progress) -> list[RoundRow]:
        """Run all rounds of all participants; one row a round."""
        self._progress = progress
        started = self._round_started = time.perf_counter() - self._evaluator.seconds
        # Modules may draw from the global generator (dropout): one seed for the whole collaboration.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._simulation.seed, "collaboration"))
            self._scheduler.run()
        self.seconds = time.perf_counter() - self._evaluator.seconds - started
        self._server.close()
        return self._rows

    @property
    def uploads(self) -> int:
        """Accepted uploads."""
        return len(self._staleness)

    @property
    def staleness_mean(self) -> float:
        """Over accepted uploads; 0 if there were none."""
        return sum(self._staleness) / max(1, len(self._staleness))

    @property
    def staleness_max(self) -> int:
        """Over accepted uploads; 0 if there were none."""
        return max(self._staleness, default=0)

    def privacy(self) -> PrivacySummary:
        """The cost of the participant that spent most: their data are disjoint."""
        released = sum(report.released_values for callback in self._callbacks for report in callback.reports)
        mechanism = self._simulation.privacy
        if mechanism is None:
            return PrivacySummary("none", simulated=False, released_values=released)
        events = [ledger.events() for ledger in self._ledgers]
        most = in_parallel(total(each, mechanism.delta, unit=mechanism.unit) for each in events)
        figures = [figure for event in events[0] if (figure := per_parameter_epsilon(event)) is not None]
        return PrivacySummary(
            mechanism=mechanism.name,
            simulated=self._simulation.make_noise("").simulated,
            released_values=released,
            epsilon=most.epsilon,
            delta=most.delta,
            unit=most.unit,
            neighbours=most.neighbours,
            method=most.method,
            per_parameter_epsilon=max(figures, default=None),
        )

    def _strategy(self, name: str, module: Classifier) -> DSSGDStrategy:
        settings = self._simulation
        speed = numpy_generator(settings.seed, name, "speed").uniform(
            1 - settings.speed_spread, 1 + settings.speed_spread
        )
        link = SimulatedLink(
            _URL,
            self._server,
            self._scheduler,
            round_seconds=1 / speed,
            drop_probability=settings.drop_probability,
            generator=numpy_generator(settings.seed, name, "drops"),
            after_upload=partial(self._after_upload, module),
        )
        ledger = None
        if settings.privacy is not None:
            ledger = Ledger(None)
            self._ledgers.append(ledger)
        return DSSGDStrategy(
            server=link,
            participant=name,
            selection=settings.selection,
            bound=settings.bound,
            privacy=settings.privacy,
            ledger=ledger,
            noise=None if ledger is None else settings.make_noise(name),
            download_fraction=settings.download_fraction,
            round_length=settings.round_length,
            quantity=settings.quantity,
            seed=settings.seed,
        )

    def _add(self, name: str, module: Classifier, trainer: pl.Trainer, share: ArrayDataset) -> None:
        generator = torch_generator(self._simulation.seed, name, "shuffle")
        batches = loader(share, self._simulation.batch_size, shuffle=True, generator=generator)
        self._scheduler.start(name, lambda: trainer.fit(module, train_dataloaders=batches))

    def _after_upload(self, module: Classifier, receipt: Receipt | None) -> None:
        if receipt is not None:
            self._staleness.append(receipt.staleness)
        self._exchanged += 1
        if self._exchanged % self._simulation.participants == 0:
            self._end_round(module)
        accuracy = f", accuracy {self._rows[-1].accuracy:.1%}" if self._rows else ""
        self._progress(1, f"collaboration, round {len(self._rows)}/{self._simulation.rounds}{accuracy}")

    def _end_round(self, module: Classifier) -> None:
        """One row. The server has no buffers; it is measured with those of the last to upload."""
        ended = time.perf_counter() - self._evaluator.seconds
        status = self._server.status()
        uploaded, downloaded = self._bytes_before_round
        merged = self._staleness[self._merged_before_round :]
        self._rows.append(
            RoundRow(
                round=len(self._rows) + 1,
                accuracy=self._evaluator.of_vector(torch.from_numpy(self._server.parameters()), module),
                uploaded_bytes=status.uploaded_bytes - uploaded,
                downloaded_bytes=status.downloaded_bytes - downloaded,
                staleness_mean=sum(merged) / max(1, len(merged)),
                seconds=ended - self._round_started,
            )
        )
        self._bytes_before_round = (status.uploaded_bytes, status.downloaded_bytes)
        self._merged_before_round = len(self._staleness)
        self._round_started = ended
