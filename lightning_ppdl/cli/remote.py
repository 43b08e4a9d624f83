"""What the commands share that ask a running server."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlencode

from omegaconf import DictConfig

from lightning_ppdl.cli.application import quiet_grpc
from lightning_ppdl.errors import ConfigurationError, ServerUnavailableError
from lightning_ppdl.validation import require_positive

if TYPE_CHECKING:
    from lightning_ppdl.backends import Backend

T = TypeVar("T")

_CREDENTIALS = ("ca", "certificate", "key", "token_file")
_SETTING = re.compile(r"[+~]{0,2}[\w./@]+=")


def with_keys(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """``URL FILE KEY=VALUE`` as Hydra takes it: words without a key get those of ``keys`` that are left.

    >>> with_keys(["grpc://127.0.0.1:50051", "json=true"], ["server"])
    ["server='grpc://127.0.0.1:50051'", 'json=true']
    """
    given, left = (
        list(arguments),
        [key for key in keys if not any(a.startswith(f"{key}=") for a in arguments)],
    )
    for position, word in enumerate(given):
        if word.startswith("-"):
            break  # a flag of Hydra's, whose own words follow
        if left and not _SETTING.match(word):
            quoted = word.replace("'", "\\'")
            given[position] = f"{left.pop(0)}='{quoted}'"
    return given


def server_address(cfg: DictConfig) -> str:
    """``server`` with the credentials of the configuration behind it."""
    query = urlencode({name: cfg[name] for name in _CREDENTIALS if cfg[name] is not None})
    joint = "&" if "?" in cfg.server else "?"
    return f"{cfg.server}{joint}{query}" if query else str(cfg.server)


def make_backend(cfg: DictConfig, command: str) -> Backend:
    """The connection that ``server``, the credentials and ``timeout_seconds`` describe; nothing is sent yet.

    Raises:
        ConfigurationError: if they describe none.
    """
    if not cfg.server:
        raise ConfigurationError(
            f"give the server's address: {command} grpc://HOST:PORT, or grpcs:// with TLS"
        )
    if str(cfg.server).startswith("memory:"):
        raise ConfigurationError(
            f"server={cfg.server!r}: such a server can be reached within its own process only; give the "
            f"address that ppdl serve printed"
        )
    require_positive("timeout_seconds", cfg.timeout_seconds)
    quiet_grpc()
    from lightning_ppdl.backends import connect  # here, so that --help needs neither torch nor gRPC

    backend = connect(server_address(cfg))
    backend.patience_seconds = cfg.timeout_seconds
    backend.tell = lambda said: None  # one line in the end says it all
    return backend


def answer_of(ask: Callable[[], T], backend: Backend) -> T:
    """What ``ask`` gets from the backend's server, within the backend's patience.

    Raises:
        ServerUnavailableError: if it gets nothing until then.
    """
    outcome: Future[T] = Future()

    def attempt() -> None:
        try:
            outcome.set_result(ask())
        except BaseException as error:
            outcome.set_exception(error)

    # In a thread: a single attempt may take longer, where packets vanish without a word.
    threading.Thread(target=attempt, name="ppdl-ask", daemon=True).start()
    try:
        return outcome.result(backend.patience_seconds + 0.5)
    except NoAnswer:
        said = f"{backend.url!r} did not answer within {backend.patience_seconds:g} seconds"
    except ServerUnavailableError as error:
        said = str(error)
    raise ServerUnavailableError(
        f"{said}. See that the server runs, that its port is open from here, and that the address begins "
        f"with grpcs:// if it has TLS, else with grpc://"
    )
