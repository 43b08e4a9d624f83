"""``grpc://``: the suite, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from backend_suite import BackendSuite

from lightning_ppdl import connect
from lightning_ppdl.backends import Backend
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.server.service import GrpcService


class TestGrpc(BackendSuite):
    @pytest.fixture(autouse=True)
    def _stop_after(self) -> Iterator[None]:
        self.services: list[GrpcService] = []
        self.backends: list[Backend] = []
        yield
        for backend in self.backends:
            backend.leave()
        for service in self.services:
            service.stop()

    def make_server(self, **settings: Any) -> ParameterServer:
        server = ParameterServer(**settings)
        service = GrpcService(server, "127.0.0.1:0")
        service.start()
        self.services.append(service)
        return server

    def connect(self) -> Backend:
        backend = connect(self.services[-1].url)
        self.backends.append(backend)
        return backend
