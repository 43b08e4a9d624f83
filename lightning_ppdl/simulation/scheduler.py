"""Cooperative scheduling on a virtual clock: which participant runs next, and what time it is there.

Each participant is one greenlet with one whole ``fit()`` inside. Threads would do too, but each keeps
an OpenMP team that spins against the others, and their order would differ from run to run.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lightning_ppdl.errors import ConfigurationError, ParticipantFailedError

try:
    from greenlet import GreenletExit, getcurrent, greenlet
except ImportError as error:
    raise ConfigurationError(
        "simulations need the package greenlet: pip install 'lightning_ppdl[simulate]'"
    ) from error


@dataclass
class _Waiting:
    task: greenlet
    ready: Callable[[], bool]
    expiry: Callable[[], float]


class Scheduler:
    """Runs tasks one at a time, in an order that depends on nothing but the tasks themselves."""

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual seconds since the start."""
        self._hub = getcurrent()
        self._starting: deque[greenlet] = deque()
        self._waiting: list[_Waiting] = []
        self._sleeping: list[tuple[float, int, greenlet]] = []
        self._slept = 0
        self._failure: tuple[str, BaseException] | None = None

    def start(self, name: str, run: Callable[[], None]) -> None:
        """Add a task; it starts when :meth:`run` gets to it, in the order in which tasks were added."""

        def guarded(started: bool) -> None:
            try:
                run()
            except GreenletExit:
                pass
            except BaseException as error:  # also Ctrl-C: the hub must hear of it, to end the others
                self._failure = (name, error)

        self._starting.append(greenlet(guarded, parent=self._hub))

    def run(self) -> None:
        """Run all tasks to their end.

        Raises:
            ParticipantFailedError: when a task raises; the others are ended first.
        """
        tasks = list(self._starting)
        try:
            while any(not task.dead for task in tasks) and self._failure is None:
                task, answer = self._next()
                task.switch(answer)
        finally:
            for task in tasks:
                if task and not task.dead:
                    task.throw(GreenletExit)
        if self._failure is not None:
            name, error = self._failure
            if not isinstance(error, Exception):
                raise KeyboardInterrupt from error
            raise ParticipantFailedError(f"{name} failed: {type(error).__name__}: {error}") from error

    def sleep(self, seconds: float) -> None:
        """Called by a task: go on ``seconds`` of virtual time later."""
        self._slept += 1
        heapq.heappush(self._sleeping, (self.now + seconds, self._slept, getcurrent()))
        self._hub.switch()

    def wait(
        self,
        ready: Callable[[], bool],
        timeout_seconds: float,
        expiry: Callable[[], float] = lambda: math.inf,
    ) -> bool:
        """Called by a task: go on when ``ready()``. False if nothing that could make it so is left.

        Args:
            ready: Asked whenever another task was suspended, and whenever time moves.
            timeout_seconds: Ignored: virtual time cannot be short.
            expiry: In how many virtual seconds time alone may next change what ``ready`` says.
        """
        if ready():
            return True
        self._waiting.append(_Waiting(getcurrent(), ready, expiry))
        return bool(self._hub.switch())

    def _next(self) -> tuple[greenlet, bool]:
        if self._starting:
            return self._starting.popleft(), True
        while True:
            for position, waiting in enumerate(self._waiting):
                if waiting.ready():
                    del self._waiting[position]
                    return waiting.task, True
            soonest = min((waiting.expiry() for waiting in self._waiting), default=math.inf)
            moment = self.now + soonest
            if self._sleeping and self._sleeping[0][0] <= moment:
                self.now, _, task = heapq.heappop(self._sleeping)
                return task, True
            if not self.now < moment < math.inf:
                return self._waiting.pop(0).task, False
            self.now = moment
