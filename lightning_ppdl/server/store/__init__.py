"""Where the shared vector lives."""

from lightning_ppdl.server.store.base import Change, Store
from lightning_ppdl.server.store.memory import MemoryStore

__all__ = ["Change", "MemoryStore", "Store"]
