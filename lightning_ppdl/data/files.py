"""Where a public data set's files come from: the user's folder, or a checked download."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lightning_ppdl.errors import ConfigurationError

#: A folder of the user's; None downloads into the user's cache.
Root: TypeAlias = str | os.PathLike[str] | None


@dataclass(frozen=True)
class PublicFile:
    """A file that anybody may download.

    Args:
        name: The file's name, the same on the server and on disk.
        url: The folder it lies in, ending in a slash.
        md5: The published checksum, in hex; guards the download, not the user's own files,
            which may rightly have been compressed anew.
    """

    name: str
    url: str
    md5: str


def check_root(root: Root) -> None:
    """Reject, at construction, what can't be a folder; whether it exists is seen on loading."""
    if root is not None and (not isinstance(root, str | os.PathLike) or not os.fspath(root)):
        raise ConfigurationError(
            f"data.root={root!r} must be a folder, or null to download into the user's cache"
        )


def find(file: PublicFile, root: Root, folders: Iterable[str] = ("",)) -> Path:
    """The path of `file`: under `root`, gzipped or not, or downloaded where root is None.

    Args:
        file: What to look for.
        root: The user's folder.
        folders: Places inside `root` to look in, best first.

    Raises:
        ConfigurationError: If it isn't there, or can't be downloaded, or its checksum is wrong.
    """
    if root is None:
        return _download(file)
    base = Path(root).expanduser()
    names = (file.name.removesuffix(".gz"), file.name)
    for candidate in (base / folder / name for folder in folders for name in names):
        if candidate.is_file():
            return candidate
    raise ConfigurationError(
        f"data.root={str(root)!r} holds no file {' or '.join(dict.fromkeys(names))}; put the file "
        f"there (it is at {file.url}{file.name}), or leave data.root null to download it"
    )


def _download(file: PublicFile) -> Path:
    pooch = optional("pooch", f"to download {file.name}")
    cache = pooch.os_cache("lightning_ppdl")
    try:
        # A file already in the cache is used if its checksum is right, and fetched anew if not.
        path = pooch.retrieve(file.url + file.name, known_hash=f"md5:{file.md5}", fname=file.name, path=cache)
    except (OSError, ValueError) as error:  # requests' errors are OSError; checksums, ValueError
        raise ConfigurationError(
            f"data.root=None, and {file.url}{file.name} could not be downloaded into {cache} "
            f"({error}); fetch the file by other means and set data.root to its folder"
        ) from error
    return Path(path)


def optional(module: str, purpose: str) -> Any:
    """Import a module of the extra `simulate`, which plain training does without.

    Raises:
        ConfigurationError: If it is not installed, saying how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{module} is needed {purpose} and could not be imported ({error}): "
            "pip install lightning_ppdl[simulate]"
        ) from error
