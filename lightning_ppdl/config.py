"""Typed schemas of the commands' configurations. Imports neither torch nor Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035 - OmegaConf resolves these at run time

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class UploadConfig:
    bound: Optional[float] = None  # noqa: UP045


@dataclass
class DownloadConfig:
    fraction: float = 1.0
    criterion: Any = MISSING


@dataclass
class ClockConfig:
    speed_spread: float = 0.5
    drop_probability: float = 0.0


@dataclass
class SimulateConfig:
    """``ppdl simulate``. Fields of type Any hold objects, given by ``_target_`` in their group's file."""

    participants: int = MISSING
    rounds: int = MISSING
    round_length: Any = MISSING
    batch_size: int = MISSING
    quantity: str = MISSING
    seed: int = MISSING
    threads: Optional[int] = MISSING  # noqa: UP045
    data: Any = MISSING
    features: Any = MISSING
    partition: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    selection: Any = MISSING
    privacy: Any = MISSING
    upload: UploadConfig = field(default_factory=UploadConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    protocol: Any = MISSING
    merge: Any = MISSING
    clock: ClockConfig = field(default_factory=ClockConfig)
    baselines: List[str] = field(default_factory=list)  # noqa: UP006
    trainer: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006


@dataclass
class PlanConfig:
    """``ppdl plan``. Every field may be a list of values to sweep."""

    participants: Any = MISSING
    rounds: Any = MISSING
    parameters: Any = MISSING
    records: Any = MISSING
    batch_size: Any = MISSING
    steps_per_round: Any = MISSING
    privacy: Any = MISSING


@dataclass
class KeysConfig:
    """``ppdl keys``."""

    directory: str = MISSING
    hosts: List[str] = field(default_factory=list)  # noqa: UP006
    participants: List[str] = field(default_factory=list)  # noqa: UP006
    days: int = MISSING


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="simulate_schema", node=SimulateConfig, provider="lightning_ppdl")
    store.store(name="plan_schema", node=PlanConfig, provider="lightning_ppdl")
    store.store(name="keys_schema", node=KeysConfig, provider="lightning_ppdl")
