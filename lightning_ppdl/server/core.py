"""The parameter server: join, take turns, download, upload, leave.

Every backend, in memory or over a network, talks to this class and to nothing behind it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_ppdl import wire
from lightning_ppdl.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    FingerprintMismatchError,
    ServerClosedError,
    StateWriteError,
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
from lightning_ppdl.server.books import Books, Member, new_session
from lightning_ppdl.server.download import DownloadCriterion, MostUpdated
from lightning_ppdl.server.durability import Durability
from lightning_ppdl.server.journal import Accepted, JournalEntry
from lightning_ppdl.server.merge import MergeRule
from lightning_ppdl.server.observe.status import ServiceStatus
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol
from lightning_ppdl.server.state import StateDirectory
from lightning_ppdl.server.vector import SharedVector
from lightning_ppdl.validation import require_fraction, require_positive

log = logging.getLogger(__name__)


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
        self.study = uuid.uuid4().hex
        """Identity of this collaboration."""
        self.changed = threading.Condition(threading.RLock())
        """Notified whenever somebody who waits for a turn should look again."""
        self.closed = False
        self._watchers: list[Callable[[], None]] = []
        self._vector = SharedVector(self.merge, self.criterion, initial, seed)
        self._books = Books(clock)
        self._dense: tuple[int, str, bytes] | None = None
        self._state = state
        self._durability: Durability | None = None

    def open(self) -> None:
        """Go on where the state directory's last server stopped; without one, or the second time, nothing.

        Raises:
            StateError: if the directory cannot be used.
            ConfigurationError: if it belongs to a collaboration with other rules.
        """
        with self.changed:
            if self._state is None or self._durability is not None:
                return
            self._state.open(after_commit=self._compact)
            try:
                durability = Durability(self._state, self._vector, self._books, self._turns)
                self.study = durability.identify(
                    self.study, type(self.protocol).__name__, self.merge.describe()
                )
                durability.restore(self._apply, self._clock(), self._terms.members)
            except BaseException:
                self._state.close()
                raise
            self._durability = durability

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
        with self._request():
            self._terms.check_join(participant, manifest, self.merge, self._books.members, server)
            first = self._vector.manifest is None
            self._vector.declare(manifest, server)
            before = self._books.members.get(participant)
            member = Member(participant, manifest) if before is None else replace(before, manifest=manifest)
            member.session, member.heard_at, member.waits_since = new_session(), self._clock(), None
            if self._durability is not None:
                try:
                    self._durability.put(member)
                except StateWriteError:
                    if first:  # what a join that failed has declared binds nobody
                        self._vector.forget()
                    raise
            self._books.enter(member)
            self._turns.enter(participant)
            self._notify()
            return Membership(
                session=member.session,
                study=self.study,
                version=self._vector.version,
                last_round=member.rounds,
                needs_initial=not self._vector.filled,
                lease_seconds=self._turns.lease_seconds,
                anytime=self._turns.anytime,
            )

    def participant(self, session: str) -> str:
        """Whose session it is.

        Raises:
            SessionEndedError: if it is nobody's.
        """
        with self._request():
            return self._books.present(session).name

    def offer_initial(self, session: str, vector: Vector) -> bool:
        """Offer the first shared parameters, float32 (P,). Only the first offer is taken.

        Returns:
            Whether this one was.
        """
        with self._request():
            taken = self._vector.fill(vector, self._books.present(session).manifest)
            if taken and self._durability is not None:
                try:
                    self._durability.snapshot()
                except StateWriteError:
                    self._vector.empty()
                    raise
            return taken

    def take_turn(self, session: str) -> bool:
        """Whether the participant may start its round now. Does not wait."""
        with self._request():
            member = self._books.present(session)
            taken = self._turns.take(member.name)
            if not taken and member.waits_since is None:
                member.waits_since = self._clock()
            elif taken and member.waits_since is not None:
                self._books.traffic.waited(self._clock() - member.waits_since)
                member.waits_since = None
            return taken

    def renew_turn(self, session: str) -> None:
        """Say that the participant is still at work on its round.

        Raises:
            TurnNotHeldError: if its lease ran out.
        """
        with self._request():
            self._turns.renew(self._books.present(session).name)

    def end_turn(self, session: str) -> None:
        """Pass the turn on without uploading."""
        with self._request():
            self._turns.end(self._books.present(session).name)
            self._merge_due()
            self._notify()

    def download(self, session: str, request: DownloadRequest) -> bytes:
        """Read parameters, encoded; see :func:`lightning_ppdl.server.download.read`.

        Raises:
            TurnNotHeldError: if the participant does not have the turn.
        """
        with self._request():
            member = self._books.present(session)
            require_fraction("download fraction", request.fraction)
            # A deadline may have passed since the turn was taken; then this is the next one.
            if not self._turns.take(member.name):
                self._turns.renew(member.name)
            message = self._encoded(self._vector.read(member.name, request), request)
            self._books.traffic.download(len(message))
            return message

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
        # What takes long, before the others are kept waiting; whether it may be asked at all is said first.
        problem, update = None, None
        try:
            update = wire.decode_update(message, self._vector.size)
        except AdmissionError as error:
            problem = error
        digest = hashlib.sha256(message).hexdigest()
        with self._request():
            member = self._books.present(session)
            if update is None:
                assert problem is not None
                raise problem
            if update.participant != member.name:
                raise AuthenticationError(
                    f"update of participant {update.participant!r}: this session is {member.name!r}'s; "
                    f"nobody uploads for another"
                )
            if (answer := member.answered(update, digest)) is not None:
                return answer
            context = self._vector.context(update)
            check_update(update, member.manifest, self._vector.version)
            self._turns.renew(member.name)
            self._turns.collect(update, context)
            accepted = Accepted(member.name, update.round, update.base_version, digest, len(message))
            if self._turns.collects:
                answer = Future()
                answer.set_result(self._accept(accepted, self._vector.version))
                if self._durability is not None:
                    self._durability.collected.append(accepted)
                self._merge_due()
                self._notify()
                return answer
            return self._merge_upload(
                member, update, JournalEntry(message, (accepted,), self._turns.state_dict())
            )

    def leave(self, session: str) -> None:
        """Take no more turns. What was merged stays, and the participant may join again."""
        with self.changed:
            try:
                member = self._books.present(session)
            except AdmissionError:
                return
            left = replace(member, session="")
            if self._durability is not None and not self.closed:
                try:
                    self._durability.put(left)
                except StateWriteError as error:  # the others need not wait for it all the same
                    log.warning("participant %r left, and a restart will not know: %s", member.name, error)
            self._books.enter(left)
            self._turns.leave(member.name)
            self._notify()
            if not self.closed:
                self._merge_due()
                self._note_turns()

    def close(self) -> None:
        """Serve no more: every later request raises ServerClosedError. What the synchronous protocol has
        collected for a cycle that is still open is not merged. A state directory is let go; another server
        may go on from it."""
        with self.changed:
            self.closed = True
            self._notify()
        # Not under the lock: what is on its way to the disk still has to be applied.
        if self._state is not None:
            self._state.close()

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

    def export(self) -> tuple[Manifest, bytes]:
        """What is shared, and its parameters as one encoded download; needs no turn.

        Raises:
            JoinRefusedError: while there are none.
        """
        with self._request():
            message = self._encoded(self._vector.read("", everything := DownloadRequest(1.0)), everything)
            assert self._vector.manifest is not None  # there are parameters
            return self._vector.manifest, message

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
        with self._look():
            return self._books.status(self._vector.version, self._vector.size, self._turns.awaited)

    def observe(self) -> ServiceStatus:
        """The same and more, for the status page and the metrics."""
        with self._look():
            status = self._books.status(self._vector.version, self._vector.size, self._turns.awaited)
            return ServiceStatus(
                protocol=type(self.protocol).__name__,
                merge=type(self.merge).__name__,
                study=self.study,
                version=status.version,
                parameters=status.parameters,
                started_seconds_ago=self._clock() - self._started,
                awaited=status.awaited,
                members=status.members,
                traffic=self._books.traffic.snapshot(),
                journal_bytes=None if self._durability is None else self._durability.state.journal_bytes,
                durable=self._durability is not None,
            )

    def seconds_to_expiry(self) -> float:
        """Until a lease or a deadline runs out, and whoever waits for a turn should look again; inf for
        never."""
        with self.changed:
            return self._turns.expires_at - self._clock()

    def watch(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called, under the server's lock, whenever :attr:`changed` is notified."""
        self._watchers.append(changed)

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
            if self._state is not None and self._durability is None:
                raise ServerClosedError("the parameter server was not opened; call its open() first")
            try:
                yield
            except (AdmissionError, ConfigurationError, FingerprintMismatchError) as error:
                self._books.traffic.reject(type(error).__name__)
                raise
            finally:
                self._note_turns()

    def _note_turns(self) -> None:
        if self._durability is not None:
            self._durability.note_turns()

    def _notify(self) -> None:
        self.changed.notify_all()
        for watcher in self._watchers:
            watcher()

    def _encoded(self, download: Download, request: DownloadRequest) -> bytes:
        if download.indices is not None:
            return wire.encode_download(download, request.dtype)
        # One copy for however many ask for the same version at the same time.
        if self._dense is None or self._dense[:2] != (download.version, request.dtype):
            message = wire.encode_download(download, request.dtype)
            self._dense = (download.version, request.dtype, message)
        return self._dense[2]

    def _merge_upload(self, member: Member, update: SparseUpdate, entry: JournalEntry) -> Future[Receipt]:
        """Merge an upload by itself, as soon as it is durable."""
        answer: Future[Receipt] = Future()
        # One of those who wait for it may give up; the upload goes on, and a retry waits for the same answer.
        answer.set_running_or_notify_cancel()

        def settle(problem: Exception | None) -> bool:
            receipt = None
            with self.changed:
                self._books.members[member.name].pending = None
                before = {} if self._durability is None else self._turns.state_dict()
                try:
                    if problem is None:
                        (receipt,) = self._apply(entry, update)
                except Exception as error:  # a merge rule's, and its uploader's to be told of
                    problem = error
                if receipt is not None and self._durability is not None:
                    self._durability.applied(entry, before)
                    self._note_turns()
            if receipt is not None:
                answer.set_result(receipt)
            else:
                answer.set_exception(problem)
            return receipt is not None

        if self._durability is None:
            settle(None)
        else:
            self._durability.state.append(entry, settle)
            member.pending = (entry.accepted[0].digest, answer)
        return answer

    def _merge_due(self) -> None:
        """Merge the mean of what the protocol has collected, if a cycle is complete."""
        update = self._turns.due()
        if update is None:
            return
        if self._durability is None:
            self._vector.merge(update)
        elif not self._durability.merge(update):
            return
        self._compact()
        self._notify()

    def _apply(self, entry: JournalEntry, update: SparseUpdate) -> list[Receipt]:
        """Merge what is in the journal, for the first time or again after a restart, and end the turns that
        led to it."""
        version = self._vector.version
        if self._turns.collects:  # the receipts came before the merge, and hold whatever became of it
            receipts = [self._accept(upload, version) for upload in entry.accepted]
        if entry.failed:
            self._vector.rehearse(update)
            return []
        self._vector.merge(update)
        if not self._turns.collects:
            receipts = [self._accept(upload, version) for upload in entry.accepted]
        for upload in entry.accepted:
            self._turns.end(upload.participant)
        self._notify()
        return receipts

    def _accept(self, upload: Accepted, version: int) -> Receipt:
        """Enter ``upload`` as part of what changes ``version`` into the next one."""
        receipt = Receipt(upload.round, version + 1, version - upload.base_version)
        self._books.accept(upload, receipt)
        return receipt

    def _compact(self) -> None:
        with self.changed:
            if self._durability is not None:
                self._durability.compact()


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name}={value!r} must be a {kind.__name__} object, e.g. {name}=...()")
