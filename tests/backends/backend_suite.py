"""What every backend must do: inherit :class:`BackendSuite`, say how to serve and how to connect."""

from backend_admission import AdmissionSuite
from backend_exchange import ExchangeSuite
from backend_synchronous import SynchronousSuite


class BackendSuite(AdmissionSuite, ExchangeSuite, SynchronousSuite):
    """All tests of a backend; a subclass named ``Test...`` supplies ``make_server`` and ``connect``."""
