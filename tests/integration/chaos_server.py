"""The server of a chaos run, in a process of its own."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path

from lightning_ppdl import Add, Asynchronous, ParameterServer, RoundRobin
from lightning_ppdl.server.state import StateDirectory

PROTOCOLS = {"asynchronous": Asynchronous, "round_robin": RoundRobin}


def serve(directory: Path, port: int, protocol: str, lease_seconds: float) -> None:
    """Serve from ``state`` in ``directory`` until there is a file ``closed`` in it. While there is one named
    ``full``, no file can be written to."""
    from lightning_ppdl.server.service import GrpcService  # not in the process that this one is forked from

    logging.raiseExceptions = False  # the log finds no room either
    logging.basicConfig(filename=directory / "server.log", level=logging.INFO)
    state = StateDirectory(directory / "state", compact_bytes=200_000)
    server = ParameterServer(
        protocol=PROTOCOLS[protocol](), merge=Add(), lease_seconds=lease_seconds, state=state
    )
    service = GrpcService(server, f"127.0.0.1:{port}")
    service.start()
    (directory / "serving").touch()
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    while not (directory / "closed").exists():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if (directory / "full").exists() else largest, largest))
        time.sleep(0.02)
    service.stop()
    server.close()
