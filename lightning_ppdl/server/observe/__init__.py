"""A running server for its operators to see: a status page and Prometheus metrics, on a port of their own."""

from lightning_ppdl.server.observe.service import StatusService
from lightning_ppdl.server.observe.status import ServiceStatus

__all__ = ["ServiceStatus", "StatusService"]
