"""How a long-running command is asked to end."""

from __future__ import annotations

import os
import queue
import signal
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """SIGTERM or Ctrl-C, as something to wait for. The second of them ends the process at once.

    To be entered in the main thread. Signals that come before :meth:`wait` are not lost.
    """

    def __init__(self) -> None:
        # The one way to wait that a signal's handler may use: an Event's lock could be held when it comes.
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> str:
        """Return the name of the signal once it has come."""
        return signal.Signals(self._asked.get()).name

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            os._exit(128 + number)
        self._ending = True
        self._asked.put(number)
