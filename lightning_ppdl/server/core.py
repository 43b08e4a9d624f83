"""The parameter server: join, take turns, download, upload, leave.

Every backend, in memory or over a network, talks to this class and to nothing behind it.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_ppdl.errors import (
    AdmissionError,
    ConfigurationError,
    JoinRefusedError,
    RoundSeenBeforeError,
    ServerClosedError,
    TurnNotHeldError,
    UnknownParticipantError,
)
from lightning_ppdl.randomness import numpy_generator
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
from lightning_ppdl.server.admission import Terms, check_change, check_update, check_vector
from lightning_ppdl.server.books import Books, Member
from lightning_ppdl.server.download import DownloadCriterion, MostUpdated, read
from lightning_ppdl.server.merge import MergeContext, MergeRule
from lightning_ppdl.server.protocol import Asynchronous, ExchangeProtocol
from lightning_ppdl.server.store import MemoryStore, Store
from lightning_ppdl.server.turns import Turns
from lightning_ppdl.tensorfile import read_vector
from lightning_ppdl.validation import require_fraction, require_name, require_positive

log = logging.getLogger(__name__)


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
        if members is not None:
            if not isinstance(members, str):
                for name in members:
                    require_name("members", name)
            if isinstance(members, str) or len(set(members)) != len(members) or not members:
                raise ConfigurationError(
                    f"members={list(members)!r} must be a list that names each participant once"
                )
        self._admitted = None if members is None else frozenset(members)
        self._terms = Terms(upload_fraction, bound)
        self._initial = initial
        self._seed = seed
        self._clock = clock
        self._turns = Turns(
            self.protocol, members or (), require_positive("lease_seconds", lease_seconds), clock
        )
        self.study = uuid.uuid4().hex
        """Identity of this collaboration."""
        self.changed = threading.Condition(threading.RLock())
        """Notified whenever somebody who waits for a turn should look again."""
        self.closed = False
        self._store: Store | None = None
        self._manifest: Manifest | None = None
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
        with self._admission():
            require_name("participant", participant)
            if self._admitted is not None and participant not in self._admitted:
                raise UnknownParticipantError(
                    f"participant={participant!r} is not among the members of {server!r}; ask its "
                    f"operator to add it"
                )
            self._agree(manifest, server)
            if self._manifest is None:
                if self._initial is not None:
                    self._store = MemoryStore(_load_initial(self._initial, manifest))
                self._manifest = manifest
            member = self._books.members.setdefault(participant, Member(manifest))
            member.manifest = manifest
            member.present = True
            member.heard_at = self._clock()
            self._turns.enter(participant)
            self.changed.notify_all()
            return Membership(
                study=self.study,
                version=self.version,
                last_round=member.rounds,
                needs_initial=self._store is None,
                lease_seconds=self._turns.lease_seconds,
            )

    def offer_initial(self, participant: str, vector: Vector) -> bool:
        """Offer the first shared parameters, float32 (P,). Only the first offer is taken.

        Returns:
            Whether this one was.
        """
        with self._admission():
            member = self._member(participant)
            if self._store is not None:
                return False
            self._store = MemoryStore(check_vector(vector, member.manifest))
            return True

    def take_turn(self, participant: str) -> bool:
        """Whether the participant may start its round now. Does not wait."""
        with self._admission():
            self._member(participant)
            return not self.protocol.takes_turns or self._turns.take(participant)

    def renew_turn(self, participant: str) -> None:
        """Say that the participant is still at work on its round.

        Raises:
            TurnNotHeldError: if its lease ran out.
        """
        with self._admission():
            self._member(participant)
            if self.protocol.takes_turns and not self._turns.renew(participant):
                raise self._turn_not_held(participant)

    def end_turn(self, participant: str) -> None:
        """Pass the turn on without uploading."""
        with self._admission():
            self._member(participant)
            self._turns.end(participant)
            self.changed.notify_all()

    def download(self, request: DownloadRequest) -> Download:
        """Read parameters; see :func:`lightning_ppdl.server.download.read`.

        Raises:
            TurnNotHeldError: if the protocol takes turns and it is another's.
        """
        with self._admission():
            self._member(request.participant)
            require_fraction("download fraction", request.fraction)
            self._require_turn(request.participant)
            if self._store is None:
                raise JoinRefusedError("the server has no parameters yet: offer_initial() first")
            generator = numpy_generator(self._seed, "download", request.participant, self.version)
            return read(self._store, request, self.criterion, generator)

    def count_download(self, encoded_bytes: int) -> None:
        """Enter the size of an encoded download in the books."""
        with self.changed:
            self._books.downloaded_bytes += encoded_bytes

    def upload(self, update: SparseUpdate, encoded_bytes: int) -> Receipt:
        """Merge one round of one participant, exactly once, and end its turn.

        The same update sent again is answered with the first receipt and not merged again.

        Raises:
            AdmissionError: one subclass for each reason to refuse; nothing is changed then.
        """
        with self._admission():
            member = self._member(update.participant)
            if update.round <= member.rounds:
                if member.receipt and member.receipt.round == update.round and member.digest == update.digest:
                    return member.receipt
                raise RoundSeenBeforeError(
                    f"round {update.round} of participant {update.participant!r} was merged already "
                    f"(its last is {member.rounds}) with other content; upload round "
                    f"{member.rounds + 1}, and see that no two participants "
                    f"share this name"
                )
            if self._store is None:
                raise JoinRefusedError("the server has no parameters yet: offer_initial() first")
            check_update(update, member.manifest, self._store.version)
            self._require_turn(update.participant)
            staleness = self._store.version - update.base_version
            context = MergeContext(staleness, member.manifest.quantity, self._store.parameters)
            change = check_change(self.merge.merge(update, context), self.merge, self._store)
            version = self._store.commit(change, update.indices, self.criterion.decay)
            member.rounds = update.round
            member.digest = update.digest
            member.receipt = Receipt(update.round, version, staleness)
            self._books.uploads += 1
            self._books.uploaded_bytes += encoded_bytes
            self._turns.end(update.participant)
            self.changed.notify_all()
            return member.receipt

    def leave(self, participant: str) -> None:
        """Take no more turns. What was merged stays, and the participant may join again."""
        with self.changed:
            member = self._books.members.get(participant)
            if member is not None and member.present:
                member.present = False
                self._turns.leave(participant)
                self.changed.notify_all()

    def close(self) -> None:
        """End the collaboration: every later request raises ServerClosedError."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    @property
    def version(self) -> int:
        """Number of updates merged so far."""
        return 0 if self._store is None else self._store.version

    def parameters(self) -> Vector:
        """Copy of the shared parameters: float32 (P,).

        Raises:
            ConfigurationError: before the first participant joined.
        """
        with self.changed:
            if self._store is None:
                raise ConfigurationError("the server has no parameters before the first participant joins")
            copied: Vector = self._store.parameters.copy()
            return copied

    def status(self) -> ServerStatus:
        """Who is here, whose turn it is, and the totals. No value of any parameter."""
        with self.changed:
            return self._books.status(
                version=self.version,
                parameters=0 if self._manifest is None else self._manifest.size,
                turn=self._turns.current if self.protocol.takes_turns else None,
                now=self._clock(),
            )

    @contextmanager
    def _admission(self) -> Iterator[None]:
        """One request: alone, to an open server, and counted if refused."""
        with self.changed:
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

    def _agree(self, manifest: Manifest, server: str) -> None:
        if self._manifest is not None:
            self._manifest.require_same_parameters(manifest, server)
        if manifest.quantity not in self.merge.quantities:
            raise JoinRefusedError(
                f"quantity={manifest.quantity!r} cannot be merged by {type(self.merge).__name__}; serve "
                f"{server!r} with merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=...))"
            )
        self._terms.check_manifest(manifest, server)

    def _require_turn(self, participant: str) -> None:
        if self.protocol.takes_turns and not self._turns.renew(participant):
            raise self._turn_not_held(participant)

    def _turn_not_held(self, participant: str) -> TurnNotHeldError:
        return TurnNotHeldError(
            f"participant {participant!r} does not have the turn ({self._turns.current!r} has it): its "
            f"lease ran out, or it never took it. Take the turn, and raise lease_seconds if a step takes "
            f"longer than the lease"
        )


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name}={value!r} must be a {kind.__name__} object, e.g. {name}=...()")


def _load_initial(initial: Vector | str | Path, manifest: Manifest) -> Vector:
    if isinstance(initial, str | Path):
        return read_vector(initial, manifest.parameters)
    return check_vector(initial, manifest)
