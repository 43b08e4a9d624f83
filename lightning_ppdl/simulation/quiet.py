"""Lightning's info lines and advice, off while many Trainers run as one job."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning_ppdl")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Errors still get through. Signal handlers, which every ``fit()`` replaces, are put back."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if in_main_thread:
            for number, handler in handlers.items():
                signal.signal(number, handler)
