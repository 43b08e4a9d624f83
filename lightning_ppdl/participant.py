"""One participant's rounds: pull, train, take the change, release, push (paper, figure 3).

Knows torch and the backend, not Lightning: who trains between :meth:`Participant.begin_round` and
:meth:`Participant.end_round` is the caller's affair.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ppdl import wire
from lightning_ppdl.backends import Backend
from lightning_ppdl.base import Base
from lightning_ppdl.devices import to_host
from lightning_ppdl.errors import ConfigurationError, ServerUnavailableError
from lightning_ppdl.exchange import Exchange
from lightning_ppdl.outbox import Outbox
from lightning_ppdl.privacy.account import Account
from lightning_ppdl.privacy.release import Release
from lightning_ppdl.randomness import torch_generator
from lightning_ppdl.records import Download, Manifest, SparseUpdate, ValueType
from lightning_ppdl.round_report import RoundReport, Sent

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
        overlap: Whether :meth:`end_round_in_flight` is going to be called; not every server allows it.
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
        overlap: bool = False,
    ) -> None:
        self.name = name
        self.manifest = manifest
        self._release = release
        self._residual = release.residual
        self._seed = seed
        self.account = account
        self._exchange = Exchange(
            backend,
            name,
            Base(manifest.size, download_fraction, dtype),
            Outbox(backend, name, account),
            turn_timeout_seconds,
        )
        self._on_unreachable = on_unreachable
        self._unreachable_seconds = unreachable_seconds
        self._dtype: ValueType = dtype
        self.round = 0
        """The last round begun."""
        self.in_round = False
        self._resumed = False
        self._merged_ahead = 0
        self._study: str | None = None
        self._overlap = overlap
        self._sent: Sent | None = None
        self._start: Tensor | None = None
        self._progress: Tensor | None = None
        self._gradients: Tensor | None = None
        self._opened: dict[str, Any] | None = None

    def join(self) -> bool:
        """Join, or join again; rounds go on after the last one that the server or this side knows.

        Rounds that were shared after the checkpoint that this participant goes on from are neither shared
        again nor skipped: it trains them once more, alone.

        Returns:
            Whether the server has no parameters yet: then call :meth:`offer_initial`.
        """
        exchange, backend = self._exchange, self._exchange.backend
        patience = self._unreachable_seconds
        # Nothing is known yet that a round could be trained alone from.
        backend.patience_seconds = 0.0 if self._on_unreachable == "fail" else patience
        membership = backend.join(self.name, self.manifest)
        backend.patience_seconds = patience if self._on_unreachable == "wait" else 0.0
        exchange.lease_seconds = membership.lease_seconds
        if self._overlap and not membership.anytime:
            raise ConfigurationError(
                f"overlap_steps above 0: {backend.url} gives turns, in which nobody trains while others do; "
                f"leave overlap_steps at 0, or serve protocol=asynchronous"
            )
        resumed = self._resumed and membership.study == self._study
        if membership.study != self._study:
            if self._study is not None:
                log.warning(
                    "%s is not the server that participant %r knew: it was made anew", backend.url, self.name
                )
            # Another server: what was downloaded from the old one is no base for anything here.
            self._study, self._opened = membership.study, None
            exchange.base.forget()
            exchange.outbox.unsent = None
            self._forget_residual()
        known = membership.last_round
        if self.account is not None:
            known = max(known, self.account.resume(membership.study, known))
            exchange.outbox.restore()
        if resumed:
            self._merged_ahead = max(0, known - self.round)
            if self._merged_ahead:
                self._forget_residual()
        else:
            self.round = max(self.round, known)
        return membership.needs_initial

    def listen(self, tell: Callable[[str], None]) -> None:
        """Have ``tell`` called, with words for people, whenever the server keeps this participant waiting."""
        self._exchange.backend.tell = tell

    def offer_initial(self, vector: Tensor) -> bool:
        """Offer the first shared parameters, float32 (P,): they leave as they are.

        Returns:
            Whether the server took them; another participant's offer may have come first.
        """
        return self._exchange.backend.offer_initial(vector.cpu().numpy())

    def begin_round(self, local: Tensor) -> Tensor | None:
        """Wait for the turn and download.

        Args:
            local: float32 (P,): this participant's parameters now.

        Returns:
            float32 (P,): the parameters to start local training from, on ``local``'s device. None to go on
            with ``local``: a checkpoint's open round goes on, the download is still on its way
            (:attr:`in_flight`), or (:attr:`in_round` is false then) this one is trained alone, since the
            server cannot be reached, or has this round already.

        Raises:
            ServerUnavailableError: if the server cannot be reached, and that is not to be gone on without.
        """
        opened, self._opened = self._opened, None
        if self.in_flight:
            self._open_round(local)
            return None
        if self._merged_ahead:
            self._merged_ahead -= 1
            self.round += 1
            self._exchange.backend.tell(
                f"round {self.round} of participant {self.name!r} was shared before the restart: it is "
                f"trained once more, alone"
            )
            return None
        try:
            self._exchange.take_turn()
            self._take_back_lost()
            if opened is None:
                taken = self._exchange.download(local)
        except ServerUnavailableError as error:
            self._train_alone(error)
            return None
        self._open_round(local)
        if opened is None:
            # A copy: local training may well happen in place.
            return self._start_from(*taken).clone()
        # Its training is in ``local``.
        self._start = opened["start"].to(local.device)
        if opened["gradients"] is not None:
            self._gradients = opened["gradients"].to(local.device)
        return None

    def _open_round(self, local: Tensor) -> None:
        self.round += 1
        self.in_round = True
        self._start = self._progress = None
        self._gradients = torch.zeros_like(local) if self.manifest.quantity == "gradient" else None

    def _start_from(self, vector: Tensor, download: Download) -> Tensor:
        """Where the open round starts, after this download: not to be changed."""
        if self._residual is not None and self.manifest.quantity == "change":
            vector = self._residual.start_from(vector, download)
        self._start = vector
        return vector

    def _train_alone(self, error: ServerUnavailableError) -> None:
        if self._on_unreachable != "local":
            raise error
        self._forget_open_round()
        self._exchange.backend.tell(f"{error}; participant {self.name!r} trains this round alone")

    @property
    def in_flight(self) -> bool:
        """Whether an exchange is still on its way: :meth:`settle` is due, in this round or after the last."""
        return self._exchange.in_flight

    def settle(self, local: Tensor) -> tuple[RoundReport, Tensor | None]:
        """Wait for the exchange that is on its way, and lay what it brings under the steps made meanwhile.

        Args:
            local: float32 (P,): this participant's parameters now.

        Returns:
            The report of the round that was sent; and float32 (P,), the parameters to go on with: those
            downloaded, and the steps since. None where ``local`` is gone on with: no round is open, or its
            download cannot be had, and it is trained alone.

        Raises:
            ServerUnavailableError: if the server cannot be reached, and that is not to be gone on without.
        """
        sent, self._sent = self._sent, None  # it holds a vector of P, and the message
        assert sent is not None
        receipt, courier = self._exchange.receipt()
        self._take_back_lost()
        report = sent.report(receipt)
        if not self.in_round:
            return report, None
        try:
            taken = self._exchange.arrived(courier, sent.local)
        except ServerUnavailableError as error:
            self._train_alone(error)
            return report, None
        self._progress = local - sent.local
        return report, self._start_from(*taken) + self._progress

    def started_from(self, local: Tensor) -> None:
        """Say what the module holds of :meth:`begin_round`'s or :meth:`settle`'s vector, if its precision is
        below float32.

        Args:
            local: float32 (P,): the parameters as rounded. The round's change is relative to them: the
                rounding is not a change, and must not be shared as one.
        """
        self._start = local if self._progress is None else local - self._progress

    @property
    def gradients(self) -> Tensor:
        """float32 (P,): the sum of this round's gradients, to be added to; only for that quantity."""
        assert self._gradients is not None, "a round that shares gradients is open"
        return self._gradients

    def keep_turn(self) -> None:
        """Give a sign of life in the middle of a round; cheap enough for every batch."""
        self._exchange.keep_turn(self.round)

    def end_round(self, local: Tensor) -> RoundReport:
        """Release this round's update and upload it.

        Args:
            local: float32 (P,): this participant's parameters after local training.

        Returns:
            The round's report. An update that got lost, or that came after the turn's lease, is not
            merged; the round counts all the same, since its update was released.
        """
        started = time.perf_counter()
        sent = self._released(local)
        receipt = self._exchange.outbox.send(sent.message)
        self._close_round(sent)
        self._take_back_lost()
        return sent.report(receipt, time.perf_counter() - started)

    def end_round_in_flight(self, local: Tensor) -> None:
        """Likewise, but let the upload, and the next download, go on meanwhile; :meth:`settle` reports."""
        self._sent = self._released(local)
        self._exchange.begin_in_flight(self._sent.message)
        self._close_round(self._sent)

    def _close_round(self, sent: Sent) -> None:
        self.in_round = False
        if self._residual is not None:
            exact = self._dtype == "float32"
            self._residual.sent(
                sent.update if exact else wire.decode_update(sent.message, self.manifest.size)
            )

    def _released(self, local: Tensor) -> Sent:
        """Through the door, and paid for: what may be sent."""
        exchange = self._exchange
        assert self._start is not None and exchange.base.version is not None and self.in_round
        delta = local - self._start if self._gradients is None else self._gradients
        generator = torch_generator(self._seed, self.name, self.round, "selection")
        released = self._release.release(delta, generator)
        indices, values = to_host(released.indices, released.values)
        update = SparseUpdate(self.name, self.round, exchange.base.version, indices, values)
        message = wire.encode_update(update, self.manifest.size, self._dtype)
        if self.account is not None:
            self.account.pay(self.round, released.event, len(indices), message)
            self._release.paid()
        return Sent(
            message,
            update,
            self.manifest.size,
            released.clamped_fraction,
            exchange.downloaded_bytes,
            exchange.seconds,
            exchange.wait_seconds,
            local,
        )

    def _take_back_lost(self) -> None:
        """Where a residual is kept, an update that was not merged is due again."""
        lost = self._exchange.outbox.take_lost()
        if lost is not None and self._residual is not None:
            self._residual.give_back(wire.decode_update(lost, self.manifest.size), self.manifest.size)

    def _forget_residual(self) -> None:
        """What was sent in the meantime is not known: rather nothing of it than a part of it twice."""
        if self._residual is not None and self._residual.values is not None:
            log.warning(
                "participant %r drops what it had not sent of earlier updates: %s has later rounds of it "
                "than its checkpoint, or is another server",
                self.name,
                self._exchange.backend.url,
            )
            self._residual.values = None

    def abandon_round(self) -> None:
        """Give the turn back without uploading; the round's number is used again."""
        if self.in_round:
            self._forget_open_round()
            self._exchange.backend.end_turn()

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
            # A ledger that cannot be written must not keep the others waiting for this one's turn; and what
            # is still on its way has to be entered before the ledger is closed.
            try:
                self._exchange.leave()
            finally:
                if self.account is not None:
                    self.account.close()

    def state_dict(self, open_round: bool = True) -> dict[str, Any]:
        """Tensors and primitives from which :meth:`load_state_dict` continues.

        Args:
            open_round: Whether a round that is open goes on then, with the parameters of the same checkpoint;
                else it is begun anew.
        """
        goes_on = open_round and self.in_round and not self.in_flight
        return {
            "study": self._study,
            "round": self.round - self.in_round,
            "open": {"start": self._start, "gradients": self._gradients} if goes_on else None,
            **self._exchange.state_dict(),
            "release": None if self._residual is None else self._residual.values,
            # Not for this participant's own sake: so that another copy of the ledger learns of them.
            "ledger": [] if self.account is None else self.account.to_primitives(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._study, self.round = state["study"], state["round"]
        self._exchange.load_state_dict(state)
        self._opened = state.get("open")
        self._resumed = True
        residual = state.get("release")
        if self._residual is not None:
            self._residual.restore(residual, self.manifest.size)
        elif residual is not None:
            log.warning("participant %r drops what its checkpoint kept for error feedback", self.name)
        if self.account is not None:
            self.account.merge_primitives(state["ledger"])
