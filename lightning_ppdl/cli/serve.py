"""``ppdl serve``: the parameter server as a process of its own."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lightning_ppdl import __version__, config
from lightning_ppdl.cli.application import build, quiet_grpc, refuse_unknown, run_application, scalar_for_list
from lightning_ppdl.cli.stopping import Stop
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server.logs import configure_logging
from lightning_ppdl.validation import require_fraction, require_positive

if TYPE_CHECKING:
    from lightning_ppdl.server.core import ParameterServer
    from lightning_ppdl.server.observe import StatusService
    from lightning_ppdl.server.service import GrpcService

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""How long a thread keeps the interpreter while others wait: the one that answers requests and the one that
writes the journal hand each upload to each other, and Python's own 5 ms would be most of what one takes."""


@dataclass(frozen=True)
class Parts:
    """What one configuration makes; nothing is started yet."""

    server: ParameterServer
    service: GrpcService
    page: StatusService | None


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    if problem := scalar_for_list(arguments, ["members"]):
        print(f"ppdl serve: {problem}", file=sys.stderr)
        return 2
    config.register()
    # An IPv6 address begins as Hydra's lists do.
    quoted = [re.sub(r"^((?:status\.)?address=)(\[[^']*)$", r"\1'\2'", argument) for argument in arguments]
    return run_application("serve", _task, quoted)


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.ServeConfig)
    configure_logging(cfg.log, cfg.log_level)
    sys.setswitchinterval(SWITCH_SECONDS)
    with Stop() as stop, ExitStack() as running:
        parts = make_parts(cfg)
        running.callback(parts.server.close)
        # First what may be refused, so that nobody joins a server that is about to end.
        parts.server.open()
        if parts.page is not None:
            _start_page(parts.page, cfg.status.address)
            running.callback(parts.page.stop)
        with _named(_TLS):
            parts.service.start()
        running.callback(parts.service.stop)
        # Whoever supervises this process starts it again, and what it has promised is on the disk.
        parts.service.failed = partial(os._exit, 1)
        print("\n".join(_banner(cfg, parts)), flush=True)
        log.info("serving at %s", parts.service.url, extra={"event": "serving", "url": parts.service.url})
        log.info("%s: answering what is under way, then ending", stop.wait())
    log.info("ended at version %d", parts.server.version, extra={"event": "ended"})


def make_parts(cfg: DictConfig) -> Parts:
    """Build every object of a ``serve`` configuration.

    Raises:
        ConfigurationError: naming the key, its value and the remedy.
    """
    quiet_grpc()
    # Here, so that --help needs neither torch nor gRPC.
    from lightning_ppdl.server.core import ParameterServer
    from lightning_ppdl.server.security import Limits, Security
    from lightning_ppdl.server.service import GrpcService
    from lightning_ppdl.server.state import StateDirectory
    from lightning_ppdl.tensorfile import require_tensor_file

    require_fraction("upload.fraction", cfg.upload.fraction)
    if cfg.upload.bound is not None:
        require_positive("upload.bound", cfg.upload.bound)
    if cfg.initial is not None:
        require_tensor_file(cfg.initial)  # else only the first participant would find out
    server = ParameterServer(
        protocol=build(cfg, "protocol"),
        merge=build(cfg, "merge"),
        members=None if cfg.members is None else list(cfg.members),
        criterion=build(cfg, "download.criterion"),
        initial=cfg.initial,
        upload_fraction=cfg.upload.fraction,
        bound=cfg.upload.bound,
        max_members=cfg.max_members,
        lease_seconds=cfg.lease_seconds,
        seed=cfg.seed,
        state=None if cfg.state is None else StateDirectory(cfg.state),
    )
    with _named((r"^", "limits.")):
        limits = Limits(**cfg.limits)
    with _named(_TLS):
        security = Security(
            certificate=cfg.tls.certificate,
            key=cfg.tls.key,
            client_ca=cfg.tls.client_ca,
            tokens=cfg.tokens,
            allow_plaintext_tokens=cfg.allow_plaintext_tokens,
        )
        service = GrpcService(server, cfg.address, security, limits)
    return Parts(server, service, _page(cfg, server))


def _page(cfg: DictConfig, server: ParameterServer) -> StatusService | None:
    from lightning_ppdl.server.identity import warn_if_exposed
    from lightning_ppdl.server.observe import StatusService
    from lightning_ppdl.server.security import is_loopback, read_file, split_address

    address, file = cfg.status.address, cfg.status.password_file
    if address is None:
        return None
    host, port = split_address("status.address", address)
    if file is None:
        if not is_loopback(host):
            raise ConfigurationError(
                f"status.address={address!r} can be reached from other machines, and the page shows who "
                f"takes part: give status.password_file, or listen on 127.0.0.1"
            )
        return StatusService(server.observe, host.strip("[]"), port)
    password = read_file("status.password_file", file).decode(errors="replace").strip()
    warn_if_exposed(file)
    shown = repr(str(file)).replace("\\", r"\\")  # what follows is a template of re.sub
    with _named((r"^password=\(hidden\)", f"status.password_file={shown}: the password in it")):
        return StatusService(server.observe, host.strip("[]"), port, password)


def _start_page(page: StatusService, address: str) -> None:
    try:
        page.start()
    except ConfigurationError as error:
        cause = error.__cause__
        said = cause.strerror if isinstance(cause, OSError) else error
        raise ConfigurationError(
            f"status.address={address!r} cannot be served: {said}. Give another port (0 takes a free one), "
            f"or status.address=null for no status page"
        ) from error


_TLS = (r"\b(certificate|key|client_ca)(?==)", r"tls.\1")


@contextmanager
def _named(change: tuple[str, str]) -> Iterator[None]:
    """Let errors name the keys of the configuration where they name a constructor's arguments."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(re.sub(*change, str(error))) from error


def _banner(cfg: DictConfig, parts: Parts) -> Iterator[str]:
    from lightning_ppdl.server.observe.words import count

    server, url = parts.server, parts.service.url
    protocol, rule = type(server.protocol).__name__, type(server.merge).__name__
    yield f"ppdl serve {__version__}: {protocol}, merging by {rule}"
    yield f"  address      {url}{_elsewhere(cfg.address, url)}"
    yield f"  encryption   {'TLS' if cfg.tls.certificate else 'none, whoever is on the way can read along'}"
    yield f"  may join     {_admitted(cfg)}"
    if cfg.state is None:
        yield "  state        in memory alone: it is gone when this process ends (state=DIRECTORY keeps it)"
    else:
        members = len(server.status().members)
        goes_on = f"goes on from version {server.version}, {count(members, 'member')}" if members else "new"
        yield f"  state        {Path(cfg.state).resolve()}: {goes_on}"
    yield f"  status page  {'none' if parts.page is None else parts.page.url}"


def _elsewhere(address: str, url: str) -> str:
    """How other machines write the address of one that listens on all of its own."""
    if address.rpartition(":")[0] not in ("0.0.0.0", "[::]"):
        return ""
    scheme, port = url.partition("://")[0], url.rpartition(":")[2]
    return f", from other machines {scheme}://{socket.gethostname()}:{port}"


def _admitted(cfg: DictConfig) -> str:
    who = "anybody" if cfg.members is None else ", ".join(cfg.members)
    asked = {"a certificate": cfg.tls.client_ca, "a token": cfg.tokens}
    proofs = " and ".join(proof for proof, file in asked.items() if file is not None)
    return f"{who}, with {proofs} to prove the name" if proofs else f"{who}, without proof of the name"
