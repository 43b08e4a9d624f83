"""Who takes part, and what the collaboration starts from: each change durable, or undone."""

from __future__ import annotations

import logging
from dataclasses import replace

from lightning_ppdl.errors import StateWriteError
from lightning_ppdl.records import Manifest, Membership, Vector
from lightning_ppdl.server.admission import Terms
from lightning_ppdl.server.books import Member, new_session
from lightning_ppdl.server.holdings import Holdings
from lightning_ppdl.server.merge import MergeRule

log = logging.getLogger(__name__)


class Members:
    """Lets participants come and go.

    Args:
        held: What they come to; its lock is held by whoever calls a method.
        terms: Who may join, and with what.
        rule: What will merge their updates.
    """

    def __init__(self, held: Holdings, terms: Terms, rule: MergeRule) -> None:
        self._held = held
        self._terms = terms
        self._rule = rule

    def join(self, participant: str, manifest: Manifest, server: str) -> Membership:
        """Take ``participant`` in under a new session, or back; arguments and errors are those of
        :meth:`lightning_ppdl.ParameterServer.join`."""
        held = self._held
        self._terms.check_join(participant, manifest, self._rule, held.books.members, server)
        first = held.vector.manifest is None
        held.vector.declare(manifest, server)
        before = held.books.members.get(participant)
        member = Member(participant, manifest) if before is None else replace(before, manifest=manifest)
        member.session, member.heard_at, member.waits_since = new_session(), held.clock(), None
        if held.durability is not None:
            try:
                held.durability.put(member)
            except StateWriteError:
                if first:  # what a join that failed has declared binds nobody
                    held.vector.forget()
                raise
        held.books.enter(member)
        held.turns.enter(participant)
        held.notify()
        return Membership(
            session=member.session,
            study=held.study,
            version=held.vector.version,
            last_round=member.rounds,
            needs_initial=not held.vector.filled,
            lease_seconds=held.turns.lease_seconds,
            anytime=held.turns.anytime,
        )

    def offer_initial(self, member: Member, vector: Vector) -> bool:
        """Start from ``vector``, float32 (P,), unless there are parameters already; whether it was taken.

        Raises:
            JoinRefusedError: if it cannot be one.
            StateWriteError: if it could not be made durable.
        """
        held = self._held
        taken = held.vector.fill(vector, member.manifest)
        if taken and held.durability is not None:
            try:
                held.durability.snapshot()
            except StateWriteError:
                held.vector.empty()
                raise
        return taken

    def take_turn(self, member: Member) -> bool:
        """Whether ``member`` may start its round now; how long it waited for that is entered in the books."""
        held = self._held
        taken = held.turns.take(member.name)
        if not taken and member.waits_since is None:
            member.waits_since = held.clock()
        elif taken and member.waits_since is not None:
            held.books.traffic.waited(held.clock() - member.waits_since)
            member.waits_since = None
        return taken

    def leave(self, member: Member) -> None:
        """End the session of ``member``, and expect it no more."""
        held = self._held
        left = replace(member, session="")
        if held.durability is not None and not held.closed:
            try:
                held.durability.put(left)
            except StateWriteError as error:  # the others need not wait for it all the same
                log.warning("participant %r left, and a restart will not know: %s", member.name, error)
        held.books.enter(left)
        held.turns.leave(member.name)
        held.notify()
