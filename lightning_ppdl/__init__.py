"""Privacy-preserving deep learning (Shokri and Shmatikov, CCS 2015) as a PyTorch Lightning strategy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_ppdl.backends import Backend as Backend
    from lightning_ppdl.backends import connect as connect
    from lightning_ppdl.backends.credentials import Credentials as Credentials
    from lightning_ppdl.backends.grpc import GrpcBackend as GrpcBackend
    from lightning_ppdl.backends.memory import close as close
    from lightning_ppdl.backends.memory import serve as serve
    from lightning_ppdl.errors import ConfigurationError as ConfigurationError
    from lightning_ppdl.errors import PPDLError as PPDLError
    from lightning_ppdl.metrics import CommunicationCost as CommunicationCost
    from lightning_ppdl.privacy.ledger import Ledger as Ledger
    from lightning_ppdl.privacy.mechanism import Mechanism as Mechanism
    from lightning_ppdl.privacy.participant_level import ParticipantLevel as ParticipantLevel
    from lightning_ppdl.privacy.record.record_level import RecordLevel as RecordLevel
    from lightning_ppdl.privacy.sparse_vector import SparseVector as SparseVector
    from lightning_ppdl.pytorch_lightning import DSSGDCallback as DSSGDCallback
    from lightning_ppdl.pytorch_lightning import DSSGDDDPStrategy as DSSGDDDPStrategy
    from lightning_ppdl.pytorch_lightning import DSSGDStrategy as DSSGDStrategy
    from lightning_ppdl.selection import ErrorFeedback as ErrorFeedback
    from lightning_ppdl.selection import LargestValues as LargestValues
    from lightning_ppdl.selection import PerLayer as PerLayer
    from lightning_ppdl.selection import RandomAboveThreshold as RandomAboveThreshold
    from lightning_ppdl.selection import RandomFraction as RandomFraction
    from lightning_ppdl.selection import Selection as Selection
    from lightning_ppdl.server.core import ParameterServer as ParameterServer
    from lightning_ppdl.server.download import ChangedSince as ChangedSince
    from lightning_ppdl.server.download import DownloadCriterion as DownloadCriterion
    from lightning_ppdl.server.download import MostRecent as MostRecent
    from lightning_ppdl.server.download import MostUpdated as MostUpdated
    from lightning_ppdl.server.merge import Add as Add
    from lightning_ppdl.server.merge import MergeRule as MergeRule
    from lightning_ppdl.server.merge import Remainder as Remainder
    from lightning_ppdl.server.merge import ServerMomentum as ServerMomentum
    from lightning_ppdl.server.merge import ServerOptimizer as ServerOptimizer
    from lightning_ppdl.server.merge import StalenessWeighted as StalenessWeighted
    from lightning_ppdl.server.protocol import Asynchronous as Asynchronous
    from lightning_ppdl.server.protocol import ExchangeProtocol as ExchangeProtocol
    from lightning_ppdl.server.protocol import RandomOrder as RandomOrder
    from lightning_ppdl.server.protocol import RoundRobin as RoundRobin
    from lightning_ppdl.server.protocol import Synchronous as Synchronous
    from lightning_ppdl.server.protocol import TurnTaking as TurnTaking
    from lightning_ppdl.server.security import Limits as Limits
    from lightning_ppdl.server.security import Security as Security
    from lightning_ppdl.server.service import GrpcService as GrpcService
    from lightning_ppdl.server.state import StateDirectory as StateDirectory

# Importing this package is cheap, and pulls in neither torch nor Lightning: Hydra imports it in every
# application of the environment to find our configuration groups.
_HOMES = {
    "backends": ("Backend", "connect"),
    "backends.credentials": ("Credentials",),
    "backends.grpc": ("GrpcBackend",),
    "backends.memory": ("close", "serve"),
    "errors": ("ConfigurationError", "PPDLError"),
    "metrics": ("CommunicationCost",),
    "privacy.ledger": ("Ledger",),
    "privacy.mechanism": ("Mechanism",),
    "privacy.participant_level": ("ParticipantLevel",),
    "privacy.record.record_level": ("RecordLevel",),
    "privacy.sparse_vector": ("SparseVector",),
    "pytorch_lightning": ("DSSGDCallback", "DSSGDDDPStrategy", "DSSGDStrategy"),
    "selection": (
        "ErrorFeedback",
        "LargestValues",
        "PerLayer",
        "RandomAboveThreshold",
        "RandomFraction",
        "Selection",
    ),
    "server.core": ("ParameterServer",),
    "server.download": ("ChangedSince", "DownloadCriterion", "MostRecent", "MostUpdated"),
    "server.merge": (
        "Add",
        "MergeRule",
        "Remainder",
        "ServerMomentum",
        "ServerOptimizer",
        "StalenessWeighted",
    ),
    "server.protocol": (
        "Asynchronous",
        "ExchangeProtocol",
        "RandomOrder",
        "RoundRobin",
        "Synchronous",
        "TurnTaking",
    ),
    "server.security": ("Limits", "Security"),
    "server.service": ("GrpcService",),
    "server.state": ("StateDirectory",),
}
_EXPORTS = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    if name == "lightning":  # a module of its own, since only it needs that package
        return import_module(f"{__name__}.lightning")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


# Lightning's two packages, and the module that makes strategies for each.
_PLUGINS = {"pytorch_lightning": "pytorch_lightning", "lightning.pytorch": "lightning"}


def _register_strategies(lightning: Any) -> None:
    # Functions, not the classes: this runs in the middle of whatever first imported Lightning, which
    # may be the very module that the classes are made in.
    def make(name: str, arguments: dict[str, Any]) -> Any:
        plugin = import_module(f"{__name__}.{_PLUGINS[lightning.__name__]}")
        return getattr(plugin, name)(**arguments)

    registry = lightning.strategies.StrategyRegistry
    one, several = "Distributed selective SGD, one device", "Distributed selective SGD, several devices"
    registry.register("dssgd", lambda **given: make("DSSGDStrategy", given), description=one)
    registry.register("dssgd_ddp", lambda **given: make("DSSGDDDPStrategy", given), description=several)


# Trainer(strategy="dssgd") works whichever of the packages is imported first.
for _package in _PLUGINS:
    wrapt.register_post_import_hook(_register_strategies, _package)
