"""What the server remembers besides the parameters: one small record a participant, and totals."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lightning_ppdl.errors import LimitExceededError, RoundSeenBeforeError, SessionEndedError
from lightning_ppdl.records import Manifest, MemberStatus, Receipt, ServerStatus, SparseUpdate
from lightning_ppdl.server.journal import Accepted
from lightning_ppdl.server.traffic import Traffic


@dataclass
class Member:
    """All that the server keeps of one participant.

    Args:
        name: Its name.
        manifest: What it declared.
        session: What it calls itself by; empty after it left.
        rounds: Of its last accepted upload, 0 for none.
        receipt, digest: That upload's.
        heard_at: When it last made a request.
        waits_since: Since when it has asked for the turn in vain; None if it does not wait.
        pending: The digest and the receipt to come of an upload that is on its way to the disk.
    """

    name: str
    manifest: Manifest
    session: str = ""
    rounds: int = 0
    receipt: Receipt | None = None
    digest: str = ""
    heard_at: float = 0.0
    waits_since: float | None = None
    pending: tuple[str, Future[Receipt]] | None = None

    def answered(self, update: SparseUpdate, digest: str) -> Future[Receipt] | None:
        """The receipt that this very message got before, or is about to get; None if it is new.

        Raises:
            RoundSeenBeforeError: if another update of this round, or a later round, was accepted.
            LimitExceededError: if another upload of this participant is on its way to the disk.
        """
        if self.pending is not None:
            if self.pending[0] == digest:
                return self.pending[1]
            raise LimitExceededError(
                f"round {update.round} of participant {self.name!r} came before its last upload was "
                f"answered; upload one round at a time"
            )
        if update.round > self.rounds:
            return None
        if self.receipt is not None and self.receipt.round == update.round and self.digest == digest:
            answer: Future[Receipt] = Future()
            answer.set_result(self.receipt)
            return answer
        raise RoundSeenBeforeError(
            f"round {update.round} of participant {self.name!r} was merged already (its last is "
            f"{self.rounds}) with other content; upload round {self.rounds + 1}, and see that no two "
            f"participants share this name"
        )

    def to_primitives(self) -> dict[str, Any]:
        """What a restart must not forget of a membership; its rounds are the journal's affair."""
        return {"manifest": self.manifest.to_primitives(), "session": self.session}

    @classmethod
    def from_primitives(cls, name: str, fields: dict[str, Any], now: float) -> Member:
        """The member that :meth:`to_primitives` wrote."""
        return cls(name, Manifest.from_primitives(fields["manifest"]), fields["session"], heard_at=now)


class Books:
    """Members by name, in the order in which they first joined, and what passed.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.members: dict[str, Member] = {}
        self._sessions: dict[str, Member] = {}
        self.traffic = Traffic(clock)

    def enter(self, member: Member) -> None:
        """Take in ``member`` under its session; an earlier session of that name ends."""
        before = self.members.get(member.name)
        if before is not None:
            self._sessions.pop(before.session, None)
        self.members[member.name] = member
        if member.session:
            self._sessions[member.session] = member

    def present(self, session: str) -> Member:
        """Whose session it is; that it makes a request is a sign of life.

        Raises:
            SessionEndedError: if it is nobody's.
        """
        member = self._sessions.get(session)
        if member is None:
            raise SessionEndedError(
                "this participant has not joined, or its session is over: it left, another process joined "
                "under its name, or the server was made anew; join"
            )
        member.heard_at = self._clock()
        return member

    def accept(self, upload: Accepted, receipt: Receipt) -> None:
        """Enter an upload that was not :meth:`Member.answered` before."""
        member = self.members[upload.participant]
        member.rounds, member.digest, member.receipt = upload.round, upload.digest, receipt
        self.traffic.upload(upload.encoded_bytes, receipt.staleness)

    def status(self, version: int, parameters: int, awaited: tuple[str, ...]) -> ServerStatus:
        """The books for others to read."""
        now = self._clock()
        traffic = self.traffic.snapshot()
        return ServerStatus(
            version=version,
            parameters=parameters,
            awaited=awaited,
            members=tuple(
                MemberStatus(name, bool(member.session), member.rounds, now - member.heard_at)
                for name, member in self.members.items()
            ),
            uploads=traffic.uploads,
            uploaded_bytes=traffic.uploaded_bytes,
            downloaded_bytes=traffic.downloaded_bytes,
            rejections=dict(traffic.rejections),
        )


def new_session() -> str:
    """A name that nobody can guess."""
    return secrets.token_hex(16)
