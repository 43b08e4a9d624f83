"""The parameter server: join, take turns, download, upload, leave.

Every backend, in memory or over a network, talks to this class and to nothing behind it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_ppdl.errors import (
    AdmissionError,
    ConfigurationError,
    ServerClosedError,
    UnknownParticipantError,
)
from lightning_ppdl.records import (
    Download,
    DownloadRequest,
    Manifest,
    Membership,
    Receipt,
    ServerStatus,
    SparseUpdate,
    Vector,
)
from lightning_ppdl.server.admission import Terms, check_update
from lightning_ppdl.server.books import Books, Member
from lightning_ppdl.server.download import DownloadCriterion, MostUpdated
from lightning_ppdl.server.merge import MergeRule
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol
from lightning_ppdl.server.vector import SharedVector
from lightning_ppdl.validation import require_fraction, require_positive


class ParameterServer:
    """Holds the shared parameters of one collaboration.

    Thread-safe; one request at a time reads or writes the parameters.

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
        lease_seconds: A turn ends after so long without a sign of life.
        seed: Of the order of ties in downloads.
        clock: Seconds, monotonic.

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
        lease_seconds: float = 60.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.protocol = Asynchronous() if protocol is None else protocol
        _require_kind("protocol", self.protocol, ExchangeProtocol)
        self.merge = self.protocol.default_merge() if merge is None else merge
        _require_kind("merge", self.merge, MergeRule)
        self.criterion = MostUpdated() if criterion is None else criterion
        _require_kind("criterion", self.criterion, DownloadCriterion)
        self._terms = Terms(upload_fraction, bound, members)
        self._clock = clock
        self._turns = self.protocol.make_turns(
            members or (), require_positive("lease_seconds", lease_seconds), clock
        )
        self.study = uuid.uuid4().hex
        """Identity of this collaboration."""
        self.changed = threading.Condition(threading.RLock())
        """Notified whenever somebody who waits for a turn should look again."""
        self.closed = False
        self._vector = SharedVector(self.merge, self.criterion, initial, seed)
        self._books = Books()

    def join(self, participant: str, manifest: Manifest, server: str = "this server") -> Membership:
        """Enter the collaboration, or come back to it.

        Args:
            participant: Its name; joining again under it continues its rounds.
            manifest: What it shares.
            server: The address it used, for error messages.

        Raises:
            FingerprintMismatchError: if it shares other parameters than the others.
            UnknownParticipantError: if it is not among the server's members.
            JoinRefusedError: if it declares more than the server agrees to.
        """
        with self._request():
            self._terms.check_join(participant, manifest, self.merge, server)
            self._vector.declare(manifest, server)
            member = self._books.members.setdefault(participant, Member(manifest))
            member.manifest = manifest
            member.present = True
            member.heard_at = self._clock()
            self._turns.enter(participant)
            self.changed.notify_all()
            return Membership(
                study=self.study,
                version=self._vector.version,
                last_round=member.rounds,
                needs_initial=not self._vector.filled,
                lease_seconds=self._turns.lease_seconds,
            )

    def offer_initial(self, participant: str, vector: Vector) -> bool:
        """Offer the first shared parameters, float32 (P,). Only the first offer is taken.

        Returns:
            Whether this one was.
        """
        with self._request():
            member = self._member(participant)
            return self._vector.fill(vector, member.manifest)

    def take_turn(self, participant: str) -> bool:
        """Whether the participant may start its round now. Does not wait."""
        with self._request():
            self._member(participant)
            return self._turns.take(participant)

    def renew_turn(self, participant: str) -> None:
        """Say that the participant is still at work on its round.

        Raises:
            TurnNotHeldError: if its lease ran out.
        """
        with self._request():
            self._member(participant)
            self._turns.renew(participant)

    def end_turn(self, participant: str) -> None:
        """Pass the turn on without uploading."""
        with self._request():
            self._member(participant)
            self._turns.end(participant)
            self._merge_due()
            self.changed.notify_all()

    def download(self, request: DownloadRequest) -> Download:
        """Read parameters; see :func:`lightning_ppdl.server.download.read`.

        Raises:
            TurnNotHeldError: if the participant does not have the turn.
        """
        with self._request():
            self._member(request.participant)
            require_fraction("download fraction", request.fraction)
            # A deadline may have passed since the turn was taken; then this is the next one.
            if not self._turns.take(request.participant):
                self._turns.renew(request.participant)
            return self._vector.read(request)

    def count_download(self, encoded_bytes: int) -> None:
        """Enter the size of an encoded download in the books."""
        with self.changed:
            self._books.downloaded_bytes += encoded_bytes

    def upload(self, update: SparseUpdate, encoded_bytes: int) -> Receipt:
        """Accept one round of one participant, exactly once, and end its turn.

        The protocol says whether it is merged at once or with others'. The same update sent again is
        answered with the first receipt and not merged again.

        Raises:
            AdmissionError: one subclass for each reason to refuse; nothing is changed then.
        """
        with self._request():
            member = self._member(update.participant)
            if (receipt := member.answered(update)) is not None:
                return receipt
            context = self._vector.context(update)
            check_update(update, member.manifest, self._vector.version)
            self._turns.renew(update.participant)
            receipt = Receipt(update.round, self._vector.version + 1, context.staleness)
            self._turns.collect(update, context)
            self._merge_due()
            self._books.accept(update, receipt, encoded_bytes)
            self._turns.end(update.participant)
            self.changed.notify_all()
            return receipt

    def leave(self, participant: str) -> None:
        """Take no more turns. What was merged stays, and the participant may join again."""
        with self.changed:
            member = self._books.members.get(participant)
            if member is not None and member.present:
                member.present = False
                self._turns.leave(participant)
                self.changed.notify_all()
                if not self.closed:
                    self._merge_due()

    def close(self) -> None:
        """End the collaboration: every later request raises ServerClosedError. What the synchronous
        protocol has collected for a cycle that is still open is not merged."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    @property
    def version(self) -> int:
        """Number of merges so far."""
        with self._look():
            return self._vector.version

    def parameters(self) -> Vector:
        """Copy of the shared parameters: float32 (P,).

        Raises:
            ConfigurationError: before the first participant joined.
        """
        with self._look():
            if not self._vector.filled:
                raise ConfigurationError("the server has no parameters before the first participant joins")
            return self._vector.copy()

    def status(self) -> ServerStatus:
        """Who is here, who is awaited, and the totals. No value of any parameter."""
        with self._look():
            return self._books.status(
                version=self._vector.version,
                parameters=self._vector.size,
                awaited=self._turns.awaited,
                now=self._clock(),
            )

    def seconds_to_expiry(self) -> float:
        """Until a lease or a deadline runs out, and whoever waits for a turn should look again; inf for
        never."""
        with self.changed:
            return self._turns.expires_at - self._clock()

    @contextmanager
    def _look(self) -> Iterator[None]:
        """Alone, and after what the passing of time has changed."""
        with self.changed:
            if not self.closed:
                self._merge_due()
            yield

    @contextmanager
    def _request(self) -> Iterator[None]:
        """One request: alone, to an open server, and counted if refused."""
        with self._look():
            if self.closed:
                raise ServerClosedError(
                    "the parameter server was closed; serve a new one under this name to go on"
                )
            try:
                yield
            except AdmissionError as error:
                self._books.rejections[type(error).__name__] += 1
                raise

    def _member(self, participant: str) -> Member:
        member = self._books.members.get(participant)
        if member is None or not member.present:
            raise UnknownParticipantError(
                f"participant {participant!r} has not joined, or left, or another of its name did; join"
            )
        member.heard_at = self._clock()
        return member

    def _merge_due(self) -> None:
        """Merge what the protocol has ready, if anything."""
        update = self._turns.due()
        if update is not None:
            self._vector.merge(update)
            self.changed.notify_all()


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name}={value!r} must be a {kind.__name__} object, e.g. {name}=...()")
