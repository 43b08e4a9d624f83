"""The directory that holds a collaboration's keys: what is there stays, what is new comes whole or not at
all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server.identity import Tokens, hash_token, new_token
from lightning_ppdl.validation import require_name

TOKENS = "tokens.txt"
_PUBLIC, _SECRET = 0o644, 0o600
_HEADER = "# A line each: participant, tab, hash of a token. Delete a line to revoke that token.\n"


class KeyFiles:
    """Collects what is to be made in ``directory``; :meth:`write` makes it.

    Raises:
        ConfigurationError: if ``directory`` is a file, or its parent is not there.
    """

    def __init__(self, directory: Path) -> None:
        parent = directory.absolute().parent
        if not parent.is_dir():
            raise ConfigurationError(
                f"directory={str(directory)!r}: there is no directory {parent}; make it first"
            )
        if directory.exists() and not directory.is_dir():
            raise ConfigurationError(f"directory={str(directory)!r} is a file: name a directory")
        self.directory = directory
        self.kept: list[str] = []
        self.notes: list[str] = []
        self._new: dict[str, tuple[bytes, int]] = {}
        self._tokens = ""

    @property
    def made(self) -> list[str]:
        """The names of the files that are made, or get lines at their end."""
        return [*self._new, TOKENS] if self._tokens else list(self._new)

    def keeps(self, name: str) -> bool:
        """Whether the file is there already; a link that leads nowhere counts."""
        there = os.path.lexists(self.directory / name)
        if there:
            self.kept.append(name)
        return there

    def read(self, name: str) -> bytes:
        """Raises ConfigurationError if it cannot be read."""
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{self.directory / name} cannot be read: {error}") from error

    def add(self, name: str, content: bytes, *, secret: bool) -> None:
        """To be made; a secret file is readable by its owner alone."""
        self._new[name] = (content, _SECRET if secret else _PUBLIC)

    def add_tokens(self, names: Sequence[str]) -> None:
        """To be made: the tokens that are missing, and their lines in the token file."""
        there = self.keeps(TOKENS)
        known = Tokens.read(self.directory / TOKENS) if there else Tokens()
        lines = [] if there else [_HEADER]
        for name in names:
            file = f"{name}.token"
            if not self.keeps(file):
                token = new_token()
                self.add(file, f"{token}\n".encode(), secret=True)
                lines.append(f"{name}\t{hash_token(token)}\n")
            elif known.owner(self.read(file).decode(errors="replace").strip()) != name:
                # Its line is not written again: it may have been deleted to revoke the token.
                self.notes.append(
                    f"{file} is not in {TOKENS}, so no server takes it: move it away, and run this again, to "
                    f"have another made"
                )
        if there and lines:
            self.kept.remove(TOKENS)
        self._tokens = "".join(lines)

    def write(self) -> None:
        """Make the files. If one cannot be made, remove those that were.

        Raises:
            ConfigurationError: for whatever the operating system refuses, a file that has appeared meanwhile
                among it.
        """
        done: list[Path] = []
        is_new = not self.directory.exists()
        try:
            if is_new:
                self.directory.mkdir(mode=0o700)
            for name, (content, mode) in self._new.items():
                path = self.directory / name
                # EXCL: never in another's place, whoever else writes here.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
                done.append(path)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
            # The one file that grows comes last, so that nothing after it can fail.
            if self._tokens:
                _append(self.directory / TOKENS, self._tokens.encode())
        except BaseException as error:
            for path in done:
                path.unlink(missing_ok=True)
            if is_new and self.directory.is_dir() and not any(self.directory.iterdir()):
                self.directory.rmdir()
            if isinstance(error, OSError):
                raise ConfigurationError(
                    f"directory={str(self.directory)!r} cannot take the keys ({error}); nothing was made. "
                    f"See that it has space and can be written to, and that nobody else is writing into it"
                ) from error
            raise


def require_stems(participants: Sequence[str]) -> list[str]:
    """Return the names if each can begin the names of files, and no two would begin the same.

    Raises:
        ConfigurationError: naming the argument ``participants``, the name and what is wrong with it.
    """
    seen: dict[str, str] = {}
    for name in participants:
        require_name("participants", name)
        problem = _problem(name)
        if not problem and name.casefold() in seen:  # upper and lower case are the same on some disks
            problem = f"would have the same files as {seen[name.casefold()]!r}"
        if problem:
            raise ConfigurationError(
                f"participants=[{name}]: {name!r} {problem}; choose another name, e.g. clinic-a"
            )
        seen[name.casefold()] = name
    return list(participants)


def _problem(name: str) -> str:
    if any(character in name for character in '/\\:*?"<>|'):
        return "holds a character that names of files cannot hold"
    if name[0] in ".-#" or name != name.strip():
        return "begins or ends with a character that a file's name should not begin or end with"
    if len(name) > 64:
        return "has more than 64 characters, which is all that a certificate's common name has room for"
    if name.casefold() in ("ca", "server") or name.casefold().endswith("-key"):
        return "would have files that are the authority's, the server's or another's key"
    return ""


def _append(path: Path, content: bytes) -> None:
    """Add whole lines to the end of a file, all or none; a new file is its owner's alone."""
    is_new = not path.exists()
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, _SECRET), "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if size:
                file.seek(size - 1)
                content = content if file.read(1) == b"\n" else b"\n" + content
            # In one go: a server that reads the file now finds all lines or none.
            if file.write(content) != len(content):
                raise OSError("no space left for all lines")
        except BaseException:
            file.truncate(size)
            if is_new:
                path.unlink()
            raise
