"""Writes of many threads, each on the disk before it is answered, that share what a disk is slow at."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Told that its item is on the disk (None), or what went wrong; whether the item could be put to use.
Then: TypeAlias = Callable[[Exception | None], bool]

_MOST_IN_A_COMMIT = 64


class GroupCommit(Generic[T]):
    """A thread that writes what was added since its last write, all of it at once, and in order.

    Args:
        commit: Makes a group durable, wholly or not at all.
        after: Called when a group is durable and each of its items was told, with those that could not be
            put to use.
    """

    def __init__(self, commit: Callable[[list[T]], None], after: Callable[[list[T]], None]) -> None:
        self._commit = commit
        self._after = after
        self._waiting: queue.SimpleQueue[tuple[T, Then] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ppdl-journal", daemon=True)
        self._thread.start()

    def add(self, item: T, then: Then) -> None:
        """Write ``item`` soon.

        Args:
            item: Items are written in the order in which they are added.
            then: Called from the writing thread, in the order of the items.
        """
        self._waiting.put((item, then))

    def close(self) -> bool:
        """Write what was added, and end; once more does nothing. Whether everything is done already: from
        within an answer it cannot be."""
        self._waiting.put(None)
        if self._thread is threading.current_thread():
            return False
        self._thread.join()
        return True

    def _run(self) -> None:
        while self._write_group():
            pass

    def _write_group(self) -> bool:
        """Write all that waits, at least one item; False when there will be no more."""
        first = self._waiting.get()
        if first is None:
            return False
        group, more = [first], True
        while more and len(group) < _MOST_IN_A_COMMIT and not self._waiting.empty():
            following = self._waiting.get()
            if following is None:
                more = False
            else:
                group.append(following)
        problem: Exception | None = None
        try:
            self._commit([item for item, _ in group])
        except Exception as error:  # whatever it is, those who wait for an answer must get one
            problem = error
        unused = [item for item, then in group if not _told(then, problem)]
        if problem is None:
            try:
                self._after(unused)
            except Exception:  # the next group must be written all the same
                log.exception("after a write to the journal")
        return more


def _told(then: Then, problem: Exception | None) -> bool:
    try:
        return then(problem)
    except Exception:  # one waiter's trouble is not the next one's
        log.exception("an entry of the journal could not be put to use")
        return False
