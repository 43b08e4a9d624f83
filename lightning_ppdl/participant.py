"""One participant's rounds: pull, train, take the change, release, push (paper, figure 3).

Knows torch and the backend, not Lightning: who trains between :meth:`Participant.begin_round` and
:meth:`Participant.end_round` is the caller's affair.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.errors import ServerUnavailableError, TurnNotHeldError
from lightning_ppdl.outbox import Outbox
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.release import Release
from lightning_ppdl.randomness import torch_generator
from lightning_ppdl.records import Download, DownloadRequest, Manifest, SparseUpdate, ValueType
from lightning_ppdl.round_report import RoundReport

log = logging.getLogger(__name__)

OnUnreachable = Literal["wait", "local", "fail"]


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
        on_unreachable: While the server cannot be reached, ``"wait"`` tries again, ``"local"`` trains round
            after round alone, and ``"fail"`` raises.
        unreachable_seconds: How long ``"wait"`` tries, and how long joining does unless it is to fail.
        dtype: How values travel.
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
        on_unreachable: OnUnreachable = "wait",
        unreachable_seconds: float = 600.0,
        dtype: ValueType = "float32",
    ) -> None:
        self.name = name
        self.manifest = manifest
        self._backend = backend
        self._release = release
        self._download_fraction = download_fraction
        self._seed = seed
        self._turn_timeout_seconds = turn_timeout_seconds
        self.account = account
        self._outbox = Outbox(backend, name, account)
        self._on_unreachable = on_unreachable
        self._unreachable_seconds = unreachable_seconds
        self._dtype: ValueType = dtype
        self.round = 0
        """The last round begun."""
        self.in_round = False
        self._resumed = False
        self._merged_ahead = 0
        self._study: str | None = None
        self._version: int | None = None
        self._base: Tensor | None = None
        self._complete = False
        self._start: Tensor | None = None
        self._gradients: Tensor | None = None
        self._opened: dict[str, Any] | None = None
        self._wait_seconds = 0.0
        self._exchange_seconds = 0.0
        self._downloaded_bytes = 0
        self._renewed_at = 0.0
        self._renew_seconds = 0.0

    def join(self) -> bool:
        """Join, or join again; rounds go on after the last one that the server or this side knows.

        Rounds that were shared after the checkpoint that this participant goes on from are neither shared
        again nor skipped: it trains them once more, alone.

        Returns:
            Whether the server has no parameters yet: then call :meth:`offer_initial`.
        """
        patience = self._unreachable_seconds
        # Nothing is known yet that a round could be trained alone from.
        self._backend.patience_seconds = 0.0 if self._on_unreachable == "fail" else patience
        membership = self._backend.join(self.name, self.manifest)
        self._backend.patience_seconds = patience if self._on_unreachable == "wait" else 0.0
        resumed = self._resumed and membership.study == self._study
        if membership.study != self._study:
            if self._study is not None:
                log.warning(
                    "%s is not the server that participant %r knew: it was made anew",
                    self._backend.url,
                    self.name,
                )
            # Another server: what was downloaded from the old one is no base for anything here.
            self._study, self._version, self._base, self._opened = membership.study, None, None, None
            self._outbox.unsent = None
        known = membership.last_round
        if self.account is not None:
            known = max(known, self.account.resume(membership.study, known))
            self._outbox.restore()
        if resumed:
            self._merged_ahead = max(0, known - self.round)
        else:
            self.round = max(self.round, known)
        self._renew_seconds = membership.lease_seconds / 4
        return membership.needs_initial

    def listen(self, tell: Callable[[str], None]) -> None:
        """Have ``tell`` called, with words for people, whenever the server keeps this participant waiting."""
        self._backend.tell = tell

    def offer_initial(self, vector: Tensor) -> bool:
        """Offer the first shared parameters, float32 (P,): they leave as they are.

        Returns:
            Whether the server took them; another participant's offer may have come first.
        """
        return self._backend.offer_initial(vector.cpu().numpy())

    def begin_round(self, local: Tensor) -> Tensor | None:
        """Wait for the turn and download.

        Args:
            local: float32 (P,): this participant's parameters now.

        Returns:
            float32 (P,): the parameters to start local training from, on ``local``'s device. None to go on
            with ``local``: a checkpoint's open round goes on, or (:attr:`in_round` is false then) this one is
            trained alone, since the server cannot be reached, or has this round already.

        Raises:
            ServerUnavailableError: if the server cannot be reached, and that is not to be gone on without.
        """
        opened, self._opened = self._opened, None
        if self._merged_ahead:
            self._merged_ahead -= 1
            self.round += 1
            self._backend.tell(
                f"round {self.round} of participant {self.name!r} was shared before the restart: it is "
                f"trained once more, alone"
            )
            return None
        try:
            if opened is None:
                return self._download(local)
            self._go_on(opened, local)
        except ServerUnavailableError as error:
            if self._on_unreachable != "local":
                raise
            self._backend.tell(f"{error}; participant {self.name!r} trains this round alone")
        return None

    def _take_turn(self) -> None:
        started = time.perf_counter()
        self._outbox.send_again(self._turn_timeout_seconds)
        self._backend.take_turn(self._turn_timeout_seconds)
        self._renewed_at = time.perf_counter()
        self._wait_seconds = self._renewed_at - started

    def _go_on(self, opened: dict[str, Any], local: Tensor) -> None:
        """With the round that was open when the checkpoint was saved: its training is in ``local``."""
        self._take_turn()
        self._downloaded_bytes, self._exchange_seconds = 0, 0.0
        self._start = opened["start"].to(local.device)
        if opened["gradients"] is not None:
            self._gradients = opened["gradients"].to(local.device)
        self.round += 1
        self.in_round = True

    def _download(self, local: Tensor) -> Tensor:
        self._take_turn()
        started = time.perf_counter()
        # Who held a mixture so far, and asks for everything now (resumed with another theta_d), has no
        # whole vector that changes could be sent over.
        known = self._version if self._complete or self._download_fraction < 1 else None
        message = self._backend.download(DownloadRequest(self._download_fraction, known, self._dtype))
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
        message = wire.encode_update(update, self.manifest.size, self._dtype)
        if self.account is not None:
            self.account.pay(self.round, released.event, len(update.indices), message)
            self._release.paid()
        receipt = self._outbox.send(message)
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
            self._forget_open_round()
            self._backend.end_turn()

    def _forget_open_round(self) -> None:
        if self.in_round:
            self.in_round = False
            self.round -= 1

    @property
    def exhausted(self) -> bool:
        """Whether the budget forbids the next round, or the next private step."""
        return self.account is not None and not self.account.affords(self._release.unrecorded + 1)

    def leave(self) -> None:
        """Leave the collaboration; :meth:`join` comes back to it."""
        self._forget_open_round()
        try:
            if self.account is not None and (event := self._release.unpaid()) is not None:
                self.account.pay(self.round, event, 0, None)
                self._release.paid()
        finally:
            # A ledger that cannot be written must not keep the others waiting for this one's turn.
            if self.account is not None:
                self.account.close()
            self._backend.leave()

    def state_dict(self, open_round: bool = True) -> dict[str, Any]:
        """Tensors and primitives from which :meth:`load_state_dict` continues.

        Args:
            open_round: Whether a round that is open goes on then, with the parameters of the same checkpoint;
                else it is begun anew.
        """
        unsent = self._outbox.unsent if self.account is None else None  # else its ledger keeps it
        return {
            "study": self._study,
            "round": self.round - self.in_round,
            "open": {"start": self._start, "gradients": self._gradients}
            if open_round and self.in_round
            else None,
            "unsent": None if unsent is None else torch.frombuffer(bytearray(unsent), dtype=torch.uint8),
            "version": self._version,
            "base": self._base,
            "complete": self._complete,
            # Not for this participant's own sake: so that another copy of the ledger learns of them.
            "ledger": [] if self.account is None else self.account.to_primitives(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._study, self.round = state["study"], state["round"]
        self._version, self._base, self._complete = state["version"], state["base"], state["complete"]
        self._opened = state.get("open")
        self._resumed = True
        if (unsent := state.get("unsent")) is not None:
            self._outbox.unsent = unsent.numpy().tobytes()
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
