"""What one server holds, for whoever of its parts works on it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_ppdl.records import ServerStatus
from lightning_ppdl.server.books import Books
from lightning_ppdl.server.durability import Durability
from lightning_ppdl.server.turns import Turns
from lightning_ppdl.server.vector import SharedVector


@dataclass(eq=False)
class Holdings:
    """Read and changed by one request at a time: whoever calls on it, or on what is in it, holds
    :attr:`changed`.

    Args:
        vector, books, turns: Of one collaboration.
        clock: Seconds, monotonic.
    """

    vector: SharedVector
    books: Books
    turns: Turns
    clock: Callable[[], float]
    durability: Durability | None = None
    """None where everything is kept in memory, and until the state directory has been opened."""
    study: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identity of the collaboration."""
    closed: bool = False
    """Whether no more requests are answered."""
    changed: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))
    """Notified whenever somebody who waits for a turn should look again."""
    watchers: list[Callable[[], None]] = field(default_factory=list)
    """Called, under the lock, whenever :attr:`changed` is notified."""

    def status(self) -> ServerStatus:
        """Who is here, who is awaited, and the totals. No value of any parameter."""
        return self.books.status(self.vector.version, self.vector.size, self.turns.awaited)

    def notify(self) -> None:
        """Have those look again who wait for a turn."""
        self.changed.notify_all()
        for watcher in self.watchers:
            watcher()

    def note_turns(self) -> None:
        """Have it written soon whose turn comes when."""
        if self.durability is not None:
            self.durability.note_turns()
