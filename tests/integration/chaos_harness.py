"""A collaboration of real processes in which everything fails, and the reckoning afterwards.

One server with its state on the disk, and participants with their ledgers, are killed at random instants and
started again; the connections between them break in the middle of messages; the server's disk is full for a
while. Afterwards the server's parameters are compared with what the participants have noted in their diaries.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from chaos_participant import SHARED, SLOTS, manifest, participate, update
from chaos_server import PROTOCOLS, serve
from proxy import Proxy

from lightning_ppdl import Add, ParameterServer, wire
from lightning_ppdl.privacy.ledger import Ledger
from lightning_ppdl.server.state import StateDirectory

# Forked from a process that has imported what takes long, and has no threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning_ppdl.server.core", "lightning_ppdl.privacy.ledger"])


@dataclass
class Outcome:
    """What was done to them, and what came of it.

    Args:
        server_kills, participant_kills, cuts, full_disks: How often.
        released: Rounds that were entered in a ledger and a diary.
        acknowledged: Of those, the ones with a receipt.
        resent: Sent again after a restart of the participant.
        turn_lost: Given up, because the turn had run out.
        merged: Rounds in the parameters.
        merged_unacknowledged: Of those, the ones whose receipt never arrived.
        failed_writes: Requests that were refused for a full disk, and tried again.
        violations: What must not be; empty if all went well.
    """

    server_kills: int = 0
    participant_kills: int = 0
    cuts: int = 0
    full_disks: int = 0
    released: int = 0
    acknowledged: int = 0
    resent: int = 0
    turn_lost: int = 0
    merged: int = 0
    merged_unacknowledged: int = 0
    failed_writes: int = 0
    violations: list[str] = field(default_factory=list)


@dataclass
class Diary:
    """What one participant noted over all its lives."""

    sent: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    got: dict[int, tuple[int, int]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    resent: int = 0


class Process:
    """A process that is started again when it was killed."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self._target = target
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        self._running = _CONTEXT.Process(target=self._target, args=self._arguments)
        self._running.start()

    def kill(self) -> bool:
        """Kill it, if it runs; False if it had ended by itself."""
        self._running.kill()
        self._running.join(30)
        return self._running.exitcode == -signal.SIGKILL

    def end(self, seconds: float) -> str | None:
        """What was wrong with its end; None for nothing."""
        self._running.join(seconds)
        if self._running.is_alive():
            self.kill()
            return "was still waiting"
        return f"ended with status {self._running.exitcode}" if self._running.exitcode else None


class Chaos:
    """One run.

    Args:
        directory: Of this run alone.
        protocol: ``"asynchronous"`` or ``"round_robin"``.
        participants: How many.
        seed: Of what is done to them, and when.
        lease_seconds: Of a turn.
    """

    def __init__(
        self, directory: Path, protocol: str, participants: int, seed: int, lease_seconds: float = 1.0
    ) -> None:
        self._directory = directory
        self._protocol = protocol
        self._chance = random.Random(seed)
        self._outcome = Outcome()
        self._calm = threading.Event()
        self._names = [f"clinic-{number}" for number in range(participants)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # Two must not kill the same one at the same time.
        self._hands_on = [threading.Lock() for _ in self._names]
        self._server = Process(serve, directory, port, protocol, lease_seconds)
        self._proxy = Proxy(port)
        self._members = [
            Process(participate, directory, self._proxy.url, participants, name, place)
            for place, name in enumerate(self._names)
        ]
        # Two threads kill participants, and not both the same one.
        self._hands_on = [threading.Lock() for _ in self._names]

    def run(self, seconds: float) -> Outcome:
        """Chaos for ``seconds``, then peace until everyone is done, then the reckoning."""
        afflictions: list[Callable[[random.Random], None]] = [self._kill_server, self._cut, self._fill_disk]
        afflictions += [self._kill_participant] * 2
        with ThreadPoolExecutor(len(afflictions)) as pool:
            at_work = [pool.submit(self._afflict, one, self._chance.random()) for one in afflictions]
            time.sleep(seconds)
            self._calm.set()
        for one in at_work:
            one.result()
        (self._directory / "stop").touch()
        deadline = time.monotonic() + 90
        for name, member in zip(self._names, self._members):
            problem = member.end(max(1.0, deadline - time.monotonic()))
            if problem is not None:
                self._outcome.violations.append(f"{name} {problem}")
        (self._directory / "closed").touch()
        if (problem := self._server.end(30)) is not None:
            self._outcome.violations.append(f"the server {problem}")
        self._proxy.close()
        self._reckon()
        return self._outcome

    # What is done to them

    def _afflict(self, what: Callable[[random.Random], None], seed: float) -> None:
        chance = random.Random(seed)
        while not self._calm.is_set():
            what(chance)

    def _kill_server(self, chance: random.Random) -> None:
        self._await_serving()
        self._calm.wait(chance.uniform(0, 3.0))
        (self._directory / "serving").unlink(missing_ok=True)
        if self._server.kill():
            self._outcome.server_kills += 1
        else:
            self._outcome.violations.append("the server ended by itself")
        time.sleep(chance.uniform(0, 0.5))
        self._server.start()

    def _await_serving(self) -> None:
        while not (self._directory / "serving").exists() and not self._calm.wait(0.01):
            pass

    def _kill_participant(self, chance: random.Random) -> None:
        self._calm.wait(chance.uniform(0.5, 5.0))
        place = chance.randrange(len(self._members))
        member = self._members[place]
        with self._hands_on[place]:
            if member.kill():
                self._outcome.participant_kills += 1
            else:
                self._outcome.violations.append(f"{self._names[place]} ended by itself")
            time.sleep(chance.uniform(0, 0.5))
            member.start()

    def _cut(self, chance: random.Random) -> None:
        """After some more bytes, which end in the middle of something."""
        passed, allowed = self._passed, chance.choice([500, 5_000, 50_000, 500_000, 3_000_000])
        until = time.monotonic() + 3
        while self._passed - passed < allowed and time.monotonic() < until:
            if self._calm.wait(0.001):
                return
        self._proxy.drop_replies = chance.random() < 0.3
        if self._proxy.drop_replies:
            self._calm.wait(chance.uniform(0, 0.3))
        self._proxy.cut()
        self._proxy.drop_replies = False
        self._outcome.cuts += 1
        self._calm.wait(chance.uniform(0.05, 0.5))

    @property
    def _passed(self) -> int:
        return self._proxy.request_bytes + self._proxy.reply_bytes

    def _fill_disk(self, chance: random.Random) -> None:
        self._calm.wait(chance.uniform(1, 5))
        (self._directory / "full").touch()
        self._outcome.full_disks += 1
        self._calm.wait(chance.uniform(0.2, 1.0))
        (self._directory / "full").unlink()

    # The reckoning

    def _reckon(self) -> None:
        outcome, violations = self._outcome, self._outcome.violations
        state = StateDirectory(self._directory / "state")
        server = ParameterServer(merge=Add(), protocol=PROTOCOLS[self._protocol](), state=state)
        server.open()
        parameters, version, study = server.parameters(), server.version, server.study
        status = server.status()
        server.close()
        size = manifest(len(self._names)).size
        shared = np.zeros(SHARED)
        versions: dict[int, str] = {}
        for place, name in enumerate(self._names):
            diary = self._read(name)
            counts = parameters[place * SLOTS : (place + 1) * SLOTS]
            merged = {int(round_) for round_ in np.flatnonzero(counts)}
            if not np.isin(counts, (0, 1)).all():
                violations.append(f"{name}: rounds merged more than once: {np.flatnonzero(counts > 1)}")
            if missing := set(diary.got) - merged:
                violations.append(f"{name}: acknowledged and not merged: {sorted(missing)}")
            if extra := merged - set(diary.sent):
                violations.append(f"{name}: merged and never sent: {sorted(extra)}")
            if max(merged, default=0) != next(m.rounds for m in status.members if m.name == name):
                violations.append(f"{name}: the books say another last round than the parameters")
            for round_ in merged & set(diary.sent):
                base, seed, digest = diary.sent[round_]
                released = update(name, place, len(self._names), round_, base, seed)
                if hashlib.sha256(wire.encode_update(released, size)).hexdigest() != digest:
                    violations.append(f"{name}: round {round_} cannot be made again")
                shared[released.indices[1:] - len(self._names) * SLOTS] += released.values[1:]
            for round_, (made, staleness) in diary.got.items():
                if versions.setdefault(made, f"{name} {round_}") != f"{name} {round_}":
                    violations.append(f"version {made} was promised to {versions[made]} and {name} {round_}")
                if made - 1 - staleness != diary.sent[round_][0]:
                    violations.append(f"{name}: the receipt of round {round_} has a wrong staleness")
            self._check_ledger(name, study, diary)
            outcome.released += len(diary.sent)
            outcome.acknowledged += len(diary.got)
            outcome.resent += diary.resent
            outcome.turn_lost += len(diary.lost)
            outcome.merged += len(merged)
            outcome.merged_unacknowledged += len(merged - set(diary.got))
            log = (self._directory / f"{name}.log").read_text(errors="replace")
            outcome.failed_writes += log.count("could not make this durable")
        if not np.array_equal(parameters[len(self._names) * SLOTS :], shared.astype(np.float32)):
            violations.append("the shared entries are not the sum of the merged rounds")
        if not version == status.uploads == outcome.merged:
            violations.append(f"version {version}, {status.uploads} uploads, {outcome.merged} merged rounds")

    def _read(self, name: str) -> Diary:
        diary = Diary()
        planned: dict[tuple[int, str], tuple[int, int]] = {}
        path = self._directory / f"{name}.diary"
        for line in path.read_text().split("\n")[:-1] if path.exists() else ():
            what, round_, *rest = line.split()
            number = int(round_)
            if what == "plan":
                planned[number, rest[2]] = int(rest[0]), int(rest[1])
            elif what == "sent":
                release = *planned[number, rest[0]], rest[0]
                diary.resent += number in diary.sent
                if diary.sent.setdefault(number, release) != release:
                    self._outcome.violations.append(f"{name}: round {number} was sent again with other bytes")
            elif what == "got":
                receipt = int(rest[0]), int(rest[1])
                if diary.got.setdefault(number, receipt) != receipt:
                    self._outcome.violations.append(f"{name}: round {number} has two receipts")
            else:
                diary.lost.add(number)
        return diary

    def _check_ledger(self, name: str, study: str, diary: Diary) -> None:
        with Ledger(self._directory / f"{name}.ledger") as ledger:
            rounds = sorted(entry.round for entry in ledger.entries() if entry.study == study)
            if rounds != [*range(1, len(rounds) + 1)] or len(rounds) != len(ledger.events()):
                self._outcome.violations.append(f"{name}: the ledger does not count each round once")
            if uncounted := set(diary.sent) - set(rounds):
                self._outcome.violations.append(f"{name}: sent and not counted: {sorted(uncounted)}")
            if ledger.pending(study, name) is not None:
                self._outcome.violations.append(f"{name}: something is still unsent")
