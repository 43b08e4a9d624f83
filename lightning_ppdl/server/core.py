"""The parameter server: join, take turns, download, upload, leave.

Every backend, in memory or over a network, talks to this class and to nothing behind it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from lightning_ppdl.errors import AdmissionError, ConfigurationError
from lightning_ppdl.records import DownloadRequest, Manifest, Membership, Receipt, ServerStatus, Vector
from lightning_ppdl.server.admission import Terms
from lightning_ppdl.server.books import Books
from lightning_ppdl.server.download import DownloadCriterion, MostUpdated
from lightning_ppdl.server.downloads import Downloads
from lightning_ppdl.server.holdings import Holdings
from lightning_ppdl.server.members import Members
from lightning_ppdl.server.merge import MergeRule
from lightning_ppdl.server.observe.observation import observation
from lightning_ppdl.server.observe.status import ServiceStatus
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol
from lightning_ppdl.server.requests import Requests
from lightning_ppdl.server.state import StateDirectory
from lightning_ppdl.server.uploads import Arrival, Uploads
from lightning_ppdl.server.vector import SharedVector
from lightning_ppdl.validation import require_positive


class ParameterServer:
    """Holds the shared parameters of one collaboration.

    Thread-safe; one request at a time reads or writes the parameters. Whoever has joined is known by its
    session from then on, and a participant has one session at a time.

    Args:
        protocol: The exchange protocol.
        merge: The merge rule; None for the protocol's default, which converges.
        members: The participants that may join, in the order of their turns; None admits anyone, in
            the order in which they come.
        criterion: Ranks entries for downloads of a fraction.
        initial: The first shared parameters: float32 (P,), or the path of a ``.safetensors`` file.
            None lets the first participant that joins offer public ones.
        upload_fraction: The largest theta_u a participant may declare.
        bound: The largest bound (gamma) a participant may declare; None for any, and none.
        max_members: The most participants that may ever join.
        lease_seconds: A turn ends after so long without a sign of life.
        seed: Of the order of ties in downloads.
        clock: Seconds, monotonic.
        state: Where merges are made durable, to go on from after a restart; None keeps everything in
            memory. Call :meth:`open` before the first request.

    Raises:
        ConfigurationError: for an argument that cannot work.
    """

    def __init__(
        self,
        protocol: ExchangeProtocol | None = None,
        merge: MergeRule | None = None,
        members: Sequence[str] | None = None,
        criterion: DownloadCriterion | None = None,
        initial: Vector | str | Path | None = None,
        upload_fraction: float = 1.0,
        bound: float | None = None,
        max_members: int | None = None,
        lease_seconds: float = 60.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        state: StateDirectory | None = None,
    ) -> None:
        self.protocol = Asynchronous() if protocol is None else protocol
        _require_kind("protocol", self.protocol, ExchangeProtocol)
        self.merge = self.protocol.default_merge() if merge is None else merge
        _require_kind("merge", self.merge, MergeRule)
        self.criterion = MostUpdated() if criterion is None else criterion
        _require_kind("criterion", self.criterion, DownloadCriterion)
        self._terms = Terms(upload_fraction, bound, members, max_members)
        self._clock = clock
        self._started = clock()
        self._turns = self.protocol.make_turns(
            members or (), require_positive("lease_seconds", lease_seconds), clock
        )
        self._vector = SharedVector(self.merge, self.criterion, initial, seed)
        self._books = Books(clock)
        self._state = state
        self._held = Holdings(self._vector, self._books, self._turns, clock)
        self._members = Members(self._held, self._terms, self.merge)
        self._downloads = Downloads(self._held)
        self._uploads = Uploads(self._held)
        self._requests = Requests(self._held, self._uploads, durable=state is not None)
        self.changed: threading.Condition = self._held.changed
        """Notified whenever somebody who waits for a turn should look again."""

    @property
    def study(self) -> str:
        """Identity of this collaboration."""
        return self._held.study

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._held.closed

    def open(self) -> None:
        """Go on where the state directory's last server stopped; without one, or the second time, nothing.

        Raises:
            StateError: if the directory cannot be used.
            ConfigurationError: if it belongs to a collaboration with other rules.
        """
        with self.changed:
            if self._state is not None and self._held.durability is None:
                protocol = type(self.protocol).__name__
                self._uploads.go_on(self._state, protocol, self.merge.describe(), self._terms.members)

    def join(self, participant: str, manifest: Manifest, server: str = "this server") -> Membership:
        """Enter the collaboration, or come back to it; an earlier session of the same name ends.

        Args:
            participant: Its name; joining again under it continues its rounds.
            manifest: What it shares.
            server: The address it used, for error messages.

        Raises:
            FingerprintMismatchError: if it shares other parameters than the others.
            UnknownParticipantError: if it is not among the server's members.
            JoinRefusedError: if it declares more than the server agrees to.
            LimitExceededError: if there are as many members as there may be.
            StateWriteError: if it could not be made durable.
        """
        with self._requests.request():
            return self._members.join(participant, manifest, server)

    def participant(self, session: str) -> str:
        """Whose session it is.

        Raises:
            SessionEndedError: if it is nobody's.
        """
        with self._requests.request():
            return self._books.present(session).name

    def offer_initial(self, session: str, vector: Vector) -> bool:
        """Offer the first shared parameters, float32 (P,). Only the first offer is taken.

        Returns:
            Whether this one was.
        """
        with self._requests.request():
            return self._members.offer_initial(self._books.present(session), vector)

    def take_turn(self, session: str) -> bool:
        """Whether the participant may start its round now. Does not wait."""
        with self._requests.request():
            return self._members.take_turn(self._books.present(session))

    def renew_turn(self, session: str) -> None:
        """Say that the participant is still at work on its round.

        Raises:
            TurnNotHeldError: if its lease ran out.
        """
        with self._requests.request():
            self._turns.renew(self._books.present(session).name)

    def end_turn(self, session: str) -> None:
        """Pass the turn on without uploading."""
        with self._requests.request():
            self._turns.end(self._books.present(session).name)
            self._uploads.merge_due()
            self._held.notify()

    def download(self, session: str, request: DownloadRequest) -> bytes:
        """Read parameters, encoded; see :func:`lightning_ppdl.server.download.read`.

        Raises:
            TurnNotHeldError: if the participant does not have the turn.
        """
        with self._requests.request():
            return self._downloads.answer(self._books.present(session), request)

    def upload(self, session: str, message: bytes | bytearray) -> Receipt:
        """:meth:`submit`, and wait for the receipt."""
        return self.submit(session, message).result()

    def submit(self, session: str, message: bytes | bytearray) -> Future[Receipt]:
        """Accept one round of one participant, exactly once, and end its turn.

        The protocol says whether it is merged at once or with others'. The same message sent again is
        answered with the first receipt and not merged again.

        Args:
            session: The participant's.
            message: An encoded update.

        Returns:
            The receipt, as soon as the upload is as durable as this server makes it.

        Raises:
            AdmissionError: one subclass for each reason to refuse; nothing is changed then.
        """
        arrival = Arrival(message, self._vector.size)
        with self._requests.request():
            return self._uploads.accept(self._books.present(session), arrival)

    def leave(self, session: str) -> None:
        """Take no more turns. What was merged stays, and the participant may join again."""
        with self.changed:
            try:
                member = self._books.present(session)
            except AdmissionError:
                return
            self._members.leave(member)
            if not self.closed:
                self._uploads.merge_due()
                self._held.note_turns()

    def close(self) -> None:
        """Serve no more: every later request raises ServerClosedError. What the synchronous protocol has
        collected for a cycle that is still open is not merged. A state directory is let go; another server
        may go on from it."""
        with self.changed:
            self._held.closed = True
            self._held.notify()
        # Not under the lock: what is on its way to the disk still has to be applied.
        if self._state is not None:
            self._state.close()

    @property
    def version(self) -> int:
        """Number of merges so far."""
        with self._requests.look():
            return self._vector.version

    def parameters(self) -> Vector:
        """Copy of the shared parameters: float32 (P,).

        Raises:
            ConfigurationError: before the first participant joined.
        """
        with self._requests.look():
            if not self._vector.filled:
                raise ConfigurationError("the server has no parameters before the first participant joins")
            return self._vector.copy()

    def export(self) -> tuple[Manifest, bytes]:
        """What is shared, and its parameters as one encoded download; needs no turn.

        Raises:
            JoinRefusedError: while there are none.
        """
        with self._requests.request():
            return self._downloads.export()

    @property
    def size(self) -> int:
        """P; 0 before the first participant."""
        return self._vector.size

    def count_rejection(self, error: AdmissionError) -> None:
        """Enter a refusal that a service made before it asked this server."""
        with self.changed:
            self._books.traffic.reject(type(error).__name__)

    def status(self) -> ServerStatus:
        """Who is here, who is awaited, and the totals. No value of any parameter."""
        with self._requests.look():
            return self._held.status()

    def observe(self) -> ServiceStatus:
        """The same and more, for the status page and the metrics."""
        with self._requests.look():
            return observation(self._held, self.protocol, self.merge, self._clock() - self._started)

    def seconds_to_expiry(self) -> float:
        """Until a lease or a deadline runs out, and whoever waits for a turn should look again; inf for
        never."""
        with self.changed:
            return self._turns.expires_at - self._clock()

    def watch(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called, under the server's lock, whenever :attr:`changed` is notified."""
        self._held.watchers.append(changed)


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name}={value!r} must be a {kind.__name__} object, e.g. {name}=...()")
