"""What the server remembers besides the parameters: one small record a participant, and totals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lightning_ppdl.records import Manifest, MemberStatus, Receipt, ServerStatus


@dataclass
class Member:
    """All that the server keeps of one participant; ``receipt`` and ``digest`` are its last upload's."""

    manifest: Manifest
    present: bool = True
    rounds: int = 0
    heard_at: float = 0.0
    receipt: Receipt | None = None
    digest: bytes = b""


@dataclass
class Books:
    """Members by name, in the order in which they first joined, and running totals."""

    members: dict[str, Member] = field(default_factory=dict)
    uploads: int = 0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    rejections: Counter[str] = field(default_factory=Counter)

    def status(self, version: int, parameters: int, turn: str | None, now: float) -> ServerStatus:
        """The books for others to read, at ``now`` seconds on the server's clock."""
        return ServerStatus(
            version=version,
            parameters=parameters,
            turn=turn,
            members=tuple(
                MemberStatus(name, member.present, member.rounds, now - member.heard_at)
                for name, member in self.members.items()
            ),
            uploads=self.uploads,
            uploaded_bytes=self.uploaded_bytes,
            downloaded_bytes=self.downloaded_bytes,
            rejections=dict(self.rejections),
        )
