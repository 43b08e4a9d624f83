"""Many participants on one machine: real Trainers, the real strategy, the real server, one process."""

from lightning_ppdl.simulation.job import simulate
from lightning_ppdl.simulation.results import Curve, RoundRow, SimulationResults
from lightning_ppdl.simulation.settings import Simulation

__all__ = ["Curve", "RoundRow", "Simulation", "SimulationResults", "simulate"]
