"""One participant's rounds: pull, train, take the change, release, push (paper, figure 3).

Knows torch and the backend, not Lightning: who trains between :meth:`Participant.begin_round` and
:meth:`Participant.end_round` is the caller's affair.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.errors import ServerUnavailableError, TurnNotHeldError
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.release import Release
from lightning_ppdl.randomness import torch_generator
from lightning_ppdl.records import Download, DownloadRequest, Manifest, Receipt, SparseUpdate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """What one round exchanged.

    Args:
        round: Counts from 1.
        merged: Whether the server took the update.
        uploaded_bytes, downloaded_bytes: Sizes of the encoded messages.
        released_values: Entries released, merged or not.
        uploaded_fraction: The same over all shared entries.
        clamped_fraction: Share of the released values that the bound changed.
        staleness: Updates of others merged in between; 0 where not merged.
        update_norm: L2 norm of the released update.
        exchange_seconds: Spent in download, release and upload.
        wait_seconds: Spent waiting for the turn.
    """

    round: int
    merged: bool
    uploaded_bytes: int
    downloaded_bytes: int
    released_values: int
    uploaded_fraction: float
    clamped_fraction: float
    staleness: int
    update_norm: float
    exchange_seconds: float
    wait_seconds: float


class Participant:
    """A member of a collaboration, between its joining and its leaving.

    Args:
        name: Its name at the server.
        backend: Its connection; joined by :meth:`join`.
        manifest: What it shares.
        release: The door through which updates leave.
        download_fraction: theta_d in (0, 1].
        seed: Of orders and samples that need no secrecy.
        turn_timeout_seconds: The longest it waits for its turn.
        account: Pays for private releases; None where nothing is private.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        manifest: Manifest,
        release: Release,
        download_fraction: float = 1.0,
        seed: int = 0,
        turn_timeout_seconds: float = 3600.0,
        account: Account | None = None,
    ) -> None:
        self.name = name
        self.manifest = manifest
        self._backend = backend
        self._release = release
        self._download_fraction = download_fraction
        self._seed = seed
        self._turn_timeout_seconds = turn_timeout_seconds
        self.account = account
        self.round = 0
        """The last round begun."""
        self.in_round = False
        self._rejoined = False
        self._study: str | None = None
        self._version: int | None = None
        self._base: Tensor | None = None
        self._complete = False
        self._start: Tensor | None = None
        self._gradients: Tensor | None = None
        self._wait_seconds = 0.0
        self._exchange_seconds = 0.0
        self._downloaded_bytes = 0
        self._renewed_at = 0.0
        self._renew_seconds = 0.0

    def join(self) -> bool:
        """Join, or join again; rounds go on after the last one that the server or this side knows.

        Returns:
            Whether the server has no parameters yet: then call :meth:`offer_initial`.
        """
        membership = self._backend.join(self.name, self.manifest)
        if membership.study != self._study:
            if self._study is not None:
                log.warning(
                    "%s is not the server that participant %r knew: it was made anew",
                    self._backend.url,
                    self.name,
                )
            # Another server: what was downloaded from the old one is no base for anything here.
            self._study, self._version, self._base = membership.study, None, None
        self.round = max(self.round, membership.last_round)
        if self.account is not None:
            known = self.account.resume(membership.study, membership.last_round)
            self.round = max(self.round, known)
        self._rejoined = True
        self._renew_seconds = membership.lease_seconds / 4
        return membership.needs_initial

    def offer_initial(self, vector: Tensor) -> bool:
        """Offer the first shared parameters, float32 (P,): they leave as they are.

        Returns:
            Whether the server took them; another participant's offer may have come first.
        """
        return self._backend.offer_initial(vector.cpu().numpy())

    def begin_round(self, local: Tensor) -> Tensor:
        """Wait for the turn and download.

        Args:
            local: float32 (P,): this participant's parameters now.

        Returns:
            float32 (P,): the parameters to start local training from, on ``local``'s device.
        """
        started = time.perf_counter()
        if self._rejoined:
            self._rejoined = False
            self._resend()
        self._backend.take_turn(self._turn_timeout_seconds)
        self._wait_seconds = time.perf_counter() - started
        self._renewed_at = started = time.perf_counter()
        # Who held a mixture so far, and asks for everything now (resumed with another theta_d), has no
        # whole vector that changes could be sent over.
        known = self._version if self._complete or self._download_fraction < 1 else None
        message = self._backend.download(DownloadRequest(self._download_fraction, known))
        download = wire.decode_download(message, self.manifest.size)
        self._base = self._overwrite(local, download)
        self._version, self._complete = download.version, download.complete
        self._downloaded_bytes = len(message)
        self._exchange_seconds = time.perf_counter() - started
        self.round += 1
        self.in_round = True
        if self.manifest.quantity == "gradient":
            self._gradients = torch.zeros_like(self._base)
        self._start = self._base
        # A copy: local training may well happen in place.
        return self._base.clone()

    def started_from(self, local: Tensor) -> None:
        """Say what the module holds of :meth:`begin_round`'s vector, if its precision is below float32.

        Args:
            local: float32 (P,): the parameters as rounded. The round's change is relative to them: the
                rounding is not a change, and must not be shared as one.
        """
        self._start = local

    @property
    def gradients(self) -> Tensor:
        """float32 (P,): the sum of this round's gradients, to be added to; only for that quantity."""
        assert self._gradients is not None, "a round that shares gradients is open"
        return self._gradients

    def keep_turn(self) -> None:
        """Give a sign of life in the middle of a round; cheap enough for every batch."""
        now = time.perf_counter()
        if now - self._renewed_at < self._renew_seconds:
            return
        self._renewed_at = now
        try:
            self._backend.renew_turn()
        except TurnNotHeldError as error:
            log.warning("round %d will not be merged: %s", self.round, error)
        except ServerUnavailableError as error:
            # One sign of life that got lost is no reason to stop; the upload will tell.
            log.info("the turn could not be renewed: %s", error)

    def end_round(self, local: Tensor) -> RoundReport:
        """Release this round's update and upload it.

        Args:
            local: float32 (P,): this participant's parameters after local training.

        Returns:
            The round's report. An update that got lost, or that came after the turn's lease, is not
            merged; the round counts all the same, since its update was released.
        """
        started = time.perf_counter()
        assert self._start is not None and self._version is not None and self.in_round
        delta = local - self._start if self._gradients is None else self._gradients
        generator = torch_generator(self._seed, self.name, self.round, "selection")
        released = self._release.release(delta, generator)
        update = SparseUpdate(
            self.name,
            self.round,
            self._version,
            released.indices.cpu().numpy(),
            np.ascontiguousarray(released.values.cpu().numpy()),
        )
        message = wire.encode_update(update, self.manifest.size)
        if self.account is not None:
            self.account.pay(self.round, released.event, len(update.indices), message)
            self._release.paid()
        receipt = self._send(message)
        self.in_round = False
        self._exchange_seconds += time.perf_counter() - started
        return RoundReport(
            round=self.round,
            merged=receipt is not None,
            uploaded_bytes=len(message),
            downloaded_bytes=self._downloaded_bytes,
            released_values=len(update.indices),
            uploaded_fraction=len(update.indices) / self.manifest.size,
            clamped_fraction=released.clamped_fraction,
            staleness=0 if receipt is None else receipt.staleness,
            update_norm=float(np.linalg.norm(update.values)),
            exchange_seconds=self._exchange_seconds,
            wait_seconds=self._wait_seconds,
        )

    def abandon_round(self) -> None:
        """Give the turn back without uploading; the round's number is used again."""
        if self.in_round:
            self.in_round = False
            self.round -= 1
            self._backend.end_turn()

    @property
    def exhausted(self) -> bool:
        """Whether the budget forbids the next round, or the next private step."""
        return self.account is not None and not self.account.affords(self._release.unrecorded + 1)

    def leave(self) -> None:
        """Leave the collaboration; :meth:`join` comes back to it."""
        self.in_round = False
        try:
            if self.account is not None and (event := self._release.unpaid()) is not None:
                self.account.pay(self.round, event, 0, None)
                self._release.paid()
        finally:
            # A ledger that cannot be written must not keep the others waiting for this one's turn.
            if self.account is not None:
                self.account.close()
            self._backend.leave()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives from which :meth:`load_state_dict` continues after a round's end."""
        return {
            "study": self._study,
            "round": self.round,
            "version": self._version,
            "base": self._base,
            "complete": self._complete,
            # Not for this participant's own sake: so that another copy of the ledger learns of them.
            "ledger": [] if self.account is None else self.account.to_primitives(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._study, self.round = state["study"], state["round"]
        self._version, self._base, self._complete = state["version"], state["base"], state["complete"]
        if self.account is not None:
            self.account.merge_primitives(state["ledger"])

    def _overwrite(self, local: Tensor, download: Download) -> Tensor:
        values = torch.from_numpy(download.values).to(local.device)
        if download.indices is None:
            return values
        # A complete download in sparse form is relative to the last one, a partial one to what the
        # participant has made of its parameters since.
        held = self._base if download.complete else local
        assert held is not None
        start = held.to(local.device, copy=True)
        start[torch.from_numpy(download.indices).to(local.device)] = values
        return start

    def _resend(self) -> None:
        """Upload what an earlier life of this participant released and may not have sent: those bytes."""
        message = None if self.account is None else self.account.unsent()
        if message is not None:
            log.info("participant %r: uploading what was released before the restart", self.name)
            self._backend.take_turn(self._turn_timeout_seconds)
            self._send(message)

    def _send(self, message: bytes) -> Receipt | None:
        try:
            receipt = self._backend.upload(message)
        except (TurnNotHeldError, ServerUnavailableError) as error:
            log.warning("participant %r: round %d was not merged: %s", self.name, self.round, error)
            if isinstance(error, ServerUnavailableError):
                return None  # perhaps it arrived: the ledger keeps the bytes until the next release
            receipt = None
        if self.account is not None:
            self.account.settled()
        return receipt
