"""One simulation from its settings to its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.evaluation import Evaluator
from lightning_ppdl.randomness import derive_seed
from lightning_ppdl.simulation.baselines import run_centralized, run_standalone
from lightning_ppdl.simulation.collaboration import Collaboration
from lightning_ppdl.simulation.quiet import quiet_lightning
from lightning_ppdl.simulation.results import Progress, SimulationResults
from lightning_ppdl.simulation.settings import Simulation


def simulate(simulation: Simulation, progress: Progress = lambda done, line: None) -> SimulationResults:
    """Load the data, build every object, and run the collaboration and the baselines.

    Args:
        simulation: What to run.
        progress: Told of every participant-round that is done; ``simulation.work`` in all.

    Raises:
        ConfigurationError: for what only shows with the data at hand, before training starts.
        ParticipantFailedError: if a participant raises.
    """
    with quiet_lightning(), _torch_threads(simulation.threads):
        return _simulate(simulation, progress)


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _simulate(simulation: Simulation, progress: Progress) -> SimulationResults:
    splits = simulation.data.load()
    dealt = simulation.partition.split(
        splits.train.labels.numpy(), simulation.participants, derive_seed(simulation.seed, "partition")
    )
    shares = [splits.train.subset(indices) for indices in dealt]
    evaluator = Evaluator(simulation.make_module(splits), splits.test, splits.classes)
    collaboration = Collaboration(simulation, splits, shares, evaluator)
    rows = collaboration.run(progress)
    if not rows:
        raise ConfigurationError(
            f"no participant trained a single batch: look at trainer={dict(simulation.trainer)!r}"
        )
    standalone = centralized = None
    if "standalone" in simulation.baselines:
        standalone = run_standalone(simulation, splits, shares, evaluator, progress)
    if "centralized" in simulation.baselines:
        pooled = splits.train.subset(np.concatenate(dealt))
        centralized = run_centralized(simulation, splits, pooled, evaluator, progress)
    return SimulationResults(
        participants=simulation.participants,
        parameters=collaboration.parameters,
        seed=simulation.seed,
        rows=rows,
        uploads=collaboration.uploads,
        staleness_mean=collaboration.staleness_mean,
        staleness_max=collaboration.staleness_max,
        seconds=collaboration.seconds,
        privacy=collaboration.privacy(),
        standalone=standalone,
        centralized=centralized,
    )
