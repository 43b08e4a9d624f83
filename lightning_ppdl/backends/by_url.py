"""From a URL to a backend."""

from __future__ import annotations

from importlib.metadata import entry_points

from lightning_ppdl.backends.base import Backend, split_url
from lightning_ppdl.backends.memory import MemoryBackend
from lightning_ppdl.errors import ConfigurationError

ENTRY_POINT_GROUP = "lightning_ppdl.backends"


def connect(url: str) -> Backend:
    """Make the backend for ``url``; nothing is sent before its first method is called.

    Other packages add schemes through the entry point group ``lightning_ppdl.backends``: the entry's
    name is the scheme, its object is called with the URL and returns a :class:`Backend`.

    Raises:
        ConfigurationError: if the URL has no scheme, an unknown one, or no name.
    """
    parts = split_url(url)
    if parts.scheme == "memory":
        return MemoryBackend(url)
    if parts.scheme in ("grpc", "grpcs"):
        # Only now: it brings a library that others do without.
        from lightning_ppdl.backends.grpc import GrpcBackend

        return GrpcBackend(url)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == parts.scheme:
            backend = entry.load()(url)
            if not isinstance(backend, Backend):
                raise ConfigurationError(
                    f"server={url!r}: the entry point {entry.value!r} made a {type(backend).__name__}, "
                    f"not a lightning_ppdl Backend"
                )
            return backend
    known = [
        "memory",
        "grpc",
        "grpcs",
        *sorted(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)),
    ]
    raise ConfigurationError(
        f"server={url!r} must be a URL with one of the schemes {', '.join(known)}, e.g. 'memory://study'"
    )
