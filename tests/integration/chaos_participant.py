"""A participant of a chaos run, in a process of its own, with a real ledger and a real connection.

What it does it also writes, durably, into a diary, which the run is checked against in the end. Its lines:
``plan ROUND BASE SEED DIGEST`` before the ledger has it, ``sent ROUND DIGEST`` before it is sent (again, by a
later life), ``got ROUND VERSION STALENESS`` for a receipt, and ``lost ROUND`` where the turn had run out.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.errors import ServerUnavailableError, SessionEndedError, TurnNotHeldError
from lightning_ppdl.privacy.events import SparseVectorRound
from lightning_ppdl.privacy.ledger import Ledger, LedgerEntry
from lightning_ppdl.records import DownloadRequest, Manifest, Membership, ParameterSpec, SparseUpdate, Vector

log = logging.getLogger(__name__)

SLOTS = 20_000
"""Entries that one participant alone changes: by 1 at the place of each of its rounds. So the parameters say
of each round how often it was merged."""
SHARED = 300_000
"""Entries that all change, by whole numbers: their float32 sums are exact in any order."""
EVENT = SparseVectorRound(0.1, 10, size=1000, bound=0.001, threshold=0.0001, variant="paper")


def manifest(participants: int) -> Manifest:
    return Manifest((ParameterSpec("w", (participants * SLOTS + SHARED,), "float32"),))


def update(name: str, place: int, participants: int, round_: int, base: int, seed: int) -> SparseUpdate:
    """What a participant releases: a few entries, or now and then more than fits into one request."""
    stream = np.random.default_rng(seed)
    count = SHARED if seed % 30 == 0 else int(stream.integers(1, 2000))
    shared = np.sort(stream.choice(SHARED, count, replace=False)) + participants * SLOTS
    indices = np.concatenate([[place * SLOTS + round_], shared])
    values = stream.integers(-4, 5, len(indices)).astype(np.float32)
    values[0] = 1
    return SparseUpdate(name, round_, base, indices, values)


class Participant:
    """One life of it."""

    def __init__(self, backend: Backend, name: str, directory: Path, place: int, participants: int) -> None:
        self.name = name
        self.place = place
        self.participants = participants
        self.manifest = manifest(participants)
        self.directory = directory
        self.backend = backend
        self.backend.patience_seconds = 45.0
        self.ledger = Ledger(directory / f"{name}.ledger")
        self._diary = os.open(directory / f"{name}.diary", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._vector: Vector = np.zeros(self.manifest.size, np.float32)
        self._known: int | None = None
        self._newest = 0
        self._mine: list[int] = []

    def note(self, *words: object) -> None:
        os.write(self._diary, (" ".join(map(str, words)) + "\n").encode())
        os.fsync(self._diary)

    def run(self) -> None:
        """Rounds, until told to stop."""
        while not (self.directory / "stop").exists():
            try:
                membership = self.join()
                self.resend(membership)
                while not (self.directory / "stop").exists():
                    self.round(membership)
            except (SessionEndedError, ServerUnavailableError) as error:
                log.info("joining again: %s", error)
        self.resend(self.join())
        self.backend.leave()
        self.ledger.close()

    def join(self) -> Membership:
        membership = self.backend.join(self.name, self.manifest)
        if membership.needs_initial:
            self.backend.offer_initial(np.zeros(self.manifest.size, np.float32))
        self.ledger.require_not_behind(membership.study, self.name, membership.last_round)
        return membership

    def resend(self, membership: Membership) -> None:
        """Send what an earlier life had recorded, and perhaps not sent."""
        unsent = self.ledger.pending(membership.study, self.name)
        if unsent is not None:
            self.send(unsent.entry, unsent.message, in_turn=False)

    def round(self, membership: Membership) -> None:
        self.backend.take_turn(60.0)
        base = self.download()
        round_ = self.ledger.last_round(membership.study, self.name) + 1
        if round_ >= SLOTS:
            self.backend.end_turn()
            time.sleep(0.1)
            return
        seed = int.from_bytes(os.urandom(6), "big")
        message = wire.encode_update(
            update(self.name, self.place, self.participants, round_, base, seed), self.manifest.size
        )
        self.note("plan", round_, base, seed, hashlib.sha256(message).hexdigest())
        entry = LedgerEntry.new(membership.study, self.name, round_, EVENT, 1)
        self.ledger.record(entry, message)
        self.send(entry, message, in_turn=True)

    def send(self, entry: LedgerEntry, message: bytes, in_turn: bool) -> None:
        self.note("sent", entry.round, hashlib.sha256(message).hexdigest())
        try:
            try:
                receipt = self.backend.upload(message)
            except TurnNotHeldError:
                if in_turn:
                    raise
                self.backend.take_turn(60.0)
                receipt = self.backend.upload(message)
        except TurnNotHeldError:
            self.note("lost", entry.round)
        else:
            self.note("got", entry.round, receipt.version, receipt.staleness)
            self._newest = max(self._newest, receipt.version)
            self._mine.append(entry.round)
        self.ledger.sent(entry.id)

    def download(self) -> int:
        """The version. What was ever acknowledged must be in it."""
        message = self.backend.download(DownloadRequest(1.0, self._known))
        received = wire.decode_download(message, self.manifest.size)
        assert received.complete and received.version >= self._newest, (received.version, self._newest)
        if received.indices is None:
            self._vector = received.values
        else:
            self._vector[received.indices] = received.values
        self._known = self._newest = received.version
        counted = self._vector[self.place * SLOTS :][self._mine]
        assert (counted == 1).all(), f"rounds {self._mine} are merged {counted} times"
        return received.version


def participate(directory: Path, url: str, participants: int, name: str, place: int) -> None:
    """Rounds, until there is a file ``stop`` in ``directory``."""
    from lightning_ppdl.backends import grpc as transport  # not in the process that this one is forked from

    logging.basicConfig(filename=directory / f"{name}.log", level=logging.INFO)
    # A run is short: as many tries in a minute as there would be in a quarter of an hour.
    transport._LONGEST_PAUSE_SECONDS = 0.4
    Participant(transport.GrpcBackend(url), name, directory, place, participants).run()
