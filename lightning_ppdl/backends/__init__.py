"""The ways to a parameter server, by URL: ``memory://NAME``, and what other packages add."""

from lightning_ppdl.backends.base import Backend
from lightning_ppdl.backends.by_url import connect

__all__ = ["Backend", "connect"]
