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
class FractionConfig:
    fraction: float = MISSING


@dataclass
class KeysConfig:
    """``ppdl keys``."""

    directory: str = MISSING
    hosts: List[str] = field(default_factory=list)  # noqa: UP006
    participants: List[str] = field(default_factory=list)  # noqa: UP006
    days: int = MISSING


@dataclass
class AgreedConfig:
    """The most that the server agrees to of each participant."""

    fraction: float = MISSING
    bound: Optional[float] = MISSING  # noqa: UP045


@dataclass
class CriterionConfig:
    criterion: Any = MISSING


@dataclass
class TLSConfig:
    certificate: Optional[str] = MISSING  # noqa: UP045
    key: Optional[str] = MISSING  # noqa: UP045
    client_ca: Optional[str] = MISSING  # noqa: UP045


@dataclass
class LimitsConfig:
    """The fields of ``lightning_ppdl.server.security.Limits``."""

    uploads_per_minute: Optional[int] = MISSING  # noqa: UP045
    transfer_seconds: float = MISSING
    silence_seconds: float = MISSING
    max_transfers: int = MISSING
    max_requests: int = MISSING
    max_requests_each: int = MISSING
    max_parameters: int = MISSING


@dataclass
class StatusPageConfig:
    address: Optional[str] = MISSING  # noqa: UP045
    password_file: Optional[str] = MISSING  # noqa: UP045


@dataclass
class ServeConfig:
    """``ppdl serve``."""

    address: str = MISSING
    state: Optional[str] = MISSING  # noqa: UP045
    members: Optional[List[str]] = MISSING  # noqa: UP006, UP045
    max_members: Optional[int] = MISSING  # noqa: UP045
    initial: Optional[str] = MISSING  # noqa: UP045
    lease_seconds: float = MISSING
    seed: int = MISSING
    protocol: Any = MISSING
    merge: Any = MISSING
    upload: AgreedConfig = field(default_factory=AgreedConfig)
    download: CriterionConfig = field(default_factory=CriterionConfig)
    tls: TLSConfig = field(default_factory=TLSConfig)
    tokens: Optional[str] = MISSING  # noqa: UP045
    allow_plaintext_tokens: bool = MISSING
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    status: StatusPageConfig = field(default_factory=StatusPageConfig)
    log: str = MISSING
    log_level: str = MISSING


@dataclass
class RemoteConfig:
    """How a command reaches a running server."""

    server: Optional[str] = MISSING  # noqa: UP045
    ca: Optional[str] = MISSING  # noqa: UP045
    certificate: Optional[str] = MISSING  # noqa: UP045
    key: Optional[str] = MISSING  # noqa: UP045
    token_file: Optional[str] = MISSING  # noqa: UP045
    timeout_seconds: float = MISSING


@dataclass
class StatusConfig(RemoteConfig):
    """``ppdl status``."""

    json: bool = MISSING


@dataclass
class ExportConfig(RemoteConfig):
    """``ppdl export``."""

    file: Optional[str] = MISSING  # noqa: UP045
    overwrite: bool = MISSING


@dataclass
class JoinConfig:
    """``ppdl join``. Fields of type Any hold objects, given by ``_target_`` in their group's file."""

    server: str = MISSING
    participant: str = MISSING
    participants: int = MISSING
    share: int = MISSING
    rounds: int = MISSING
    round_length: Any = MISSING
    batch_size: int = MISSING
    quantity: str = MISSING
    initial: Any = MISSING
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
    download: FractionConfig = field(default_factory=FractionConfig)
    transfer_dtype: str = MISSING
    overlap_steps: int = MISSING
    turn_timeout_seconds: float = MISSING
    on_unreachable: str = MISSING
    unreachable_seconds: float = MISSING
    ca: Optional[str] = MISSING  # noqa: UP045
    certificate: Optional[str] = MISSING  # noqa: UP045
    key: Optional[str] = MISSING  # noqa: UP045
    token_file: Optional[str] = MISSING  # noqa: UP045
    directory: str = MISSING
    ledger: str = MISSING
    trainer: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="simulate_schema", node=SimulateConfig, provider="lightning_ppdl")
    store.store(name="plan_schema", node=PlanConfig, provider="lightning_ppdl")
    store.store(name="keys_schema", node=KeysConfig, provider="lightning_ppdl")
    store.store(name="serve_schema", node=ServeConfig, provider="lightning_ppdl")
    store.store(name="status_schema", node=StatusConfig, provider="lightning_ppdl")
    store.store(name="export_schema", node=ExportConfig, provider="lightning_ppdl")
    store.store(name="join_schema", node=JoinConfig, provider="lightning_ppdl")
