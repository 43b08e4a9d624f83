"""What the server remembers besides the parameters: one small record a participant, and totals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lightning_ppdl.errors import RoundSeenBeforeError
from lightning_ppdl.records import Manifest, MemberStatus, Receipt, ServerStatus, SparseUpdate


@dataclass
class Member:
    """All that the server keeps of one participant; ``receipt`` and ``digest`` are its last upload's."""

    manifest: Manifest
    present: bool = True
    rounds: int = 0
    heard_at: float = 0.0
    receipt: Receipt | None = None
    digest: bytes = b""

    def answered(self, update: SparseUpdate) -> Receipt | None:
        """The receipt that ``update`` got before, None if it is new.

        Raises:
            RoundSeenBeforeError: if another update of this round, or a later round, was accepted.
        """
        if update.round > self.rounds:
            return None
        if self.receipt and self.receipt.round == update.round and self.digest == update.digest:
            return self.receipt
        raise RoundSeenBeforeError(
            f"round {update.round} of participant {update.participant!r} was merged already (its last is "
            f"{self.rounds}) with other content; upload round {self.rounds + 1}, and see that no two "
            f"participants share this name"
        )


@dataclass
class Books:
    """Members by name, in the order in which they first joined, and running totals."""

    members: dict[str, Member] = field(default_factory=dict)
    uploads: int = 0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    rejections: Counter[str] = field(default_factory=Counter)

    def accept(self, update: SparseUpdate, receipt: Receipt, encoded_bytes: int) -> None:
        """Enter an upload that was not :meth:`Member.answered` before."""
        member = self.members[update.participant]
        member.rounds, member.digest, member.receipt = update.round, update.digest, receipt
        self.uploads += 1
        self.uploaded_bytes += encoded_bytes

    def status(self, version: int, parameters: int, awaited: tuple[str, ...], now: float) -> ServerStatus:
        """The books for others to read, at ``now`` seconds on the server's clock."""
        return ServerStatus(
            version=version,
            parameters=parameters,
            awaited=awaited,
            members=tuple(
                MemberStatus(name, member.present, member.rounds, now - member.heard_at)
                for name, member in self.members.items()
            ),
            uploads=self.uploads,
            uploaded_bytes=self.uploaded_bytes,
            downloaded_bytes=self.downloaded_bytes,
            rejections=dict(self.rejections),
        )
