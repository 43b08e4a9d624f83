"""Which entries a partial download holds (paper, section 5.2: "download the most updated")."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_ppdl.records import Download, DownloadRequest, Indices, entries
from lightning_ppdl.server.store import Store
from lightning_ppdl.validation import require_fraction


class DownloadCriterion(ABC):
    """Ranks the entries for participants that download a fraction (theta_d) below 1."""

    decay: float = 1.0
    """beta: what every stat is multiplied by at each upload."""

    @abstractmethod
    def scores(self, store: Store, known_version: int) -> npt.NDArray[np.float32]:
        """Score every entry; the highest are downloaded, ties in random order.

        Args:
            store: The parameters' books; do not change them.
            known_version: The version of the participant's last download.

        Returns:
            float (P,); -inf for entries that must not be downloaded.
        """


@dataclass(frozen=True)
class MostUpdated(DownloadCriterion):
    """The entries with the largest stat: uploaded most often.

    Args:
        decay: beta in (0, 1]; below 1, recent uploads weigh more.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        require_fraction("decay", self.decay)

    def scores(self, store: Store, known_version: int) -> npt.NDArray[np.float32]:
        return store.stat


@dataclass(frozen=True)
class MostRecent(DownloadCriterion):
    """The entries whose last change is most recent."""

    def scores(self, store: Store, known_version: int) -> npt.NDArray[np.float32]:
        return store.changed_at.astype(np.float32)


@dataclass(frozen=True)
class ChangedSince(DownloadCriterion):
    """Only entries changed since the participant's last download, the most updated first.

    Of more such entries than the fraction holds, those left out come when they change again.
    """

    def scores(self, store: Store, known_version: int) -> npt.NDArray[np.float32]:
        return np.where(store.changed_at > known_version, store.stat, np.float32(-np.inf))


def read(
    store: Store,
    request: DownloadRequest,
    criterion: DownloadCriterion,
    generator: np.random.Generator,
) -> Download:
    """Answer a download.

    A first download holds everything, whatever the fraction, so that all start from the same
    parameters. A complete one is sent dense or as what changed since, whichever is smaller.

    Returns:
        A download that may show the store's own array: encode it before the next merge.
    """
    size = len(store.parameters)
    known = request.known_version
    if known is None or known > store.version:
        return Download(store.version, None, store.parameters, complete=True)
    complete = request.fraction == 1.0
    if complete:
        indices = np.flatnonzero(store.changed_at > known)
        # An index costs about a bit where most entries are sent, and a value from 10 bits on.
        if 10 * len(indices) >= 9 * size:
            return Download(store.version, None, store.parameters, complete=True)
    else:
        count = max(1, entries(request.fraction, size))
        indices = _highest(criterion.scores(store, known), count, generator)
    return Download(store.version, indices, store.parameters[indices], complete)


def _highest(scores: npt.NDArray[np.float32], count: int, generator: np.random.Generator) -> Indices:
    smallest = np.partition(scores, len(scores) - count)[len(scores) - count]
    if smallest == -np.inf:
        return np.flatnonzero(scores > smallest)
    above = np.flatnonzero(scores > smallest)
    # In random order, else entries that tie at the cut would be left out for good.
    ties = generator.permutation(np.flatnonzero(scores == smallest))[: count - len(above)]
    return np.sort(np.concatenate([above, ties]))
