"""The shared vector of one collaboration: how it begins, is read, and is changed by the merge rule."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lightning_ppdl.errors import JoinRefusedError
from lightning_ppdl.randomness import numpy_generator
from lightning_ppdl.records import Download, DownloadRequest, Manifest, SparseUpdate, Vector
from lightning_ppdl.server.admission import check_change, check_vector
from lightning_ppdl.server.download import DownloadCriterion, read
from lightning_ppdl.server.merge import MergeContext, MergeRule
from lightning_ppdl.server.store import MemoryStore, Store
from lightning_ppdl.tensorfile import read_vector

_RULE = "merge."


class SharedVector:
    """A store that is made once the first participant has said what is shared.

    Args:
        rule: Says what an update does to the parameters.
        criterion: Ranks entries for downloads of a fraction.
        initial: The first parameters, as in :class:`~lightning_ppdl.ParameterServer`.
        seed: Of the order of ties in downloads.
    """

    def __init__(
        self, rule: MergeRule, criterion: DownloadCriterion, initial: Vector | str | Path | None, seed: int
    ) -> None:
        self._rule = rule
        self._criterion = criterion
        self._initial = initial
        self._seed = seed
        self._manifest: Manifest | None = None
        self._store: Store | None = None

    @property
    def manifest(self) -> Manifest | None:
        """What is shared; None before the first participant."""
        return self._manifest

    @property
    def filled(self) -> bool:
        """Whether there are parameters."""
        return self._store is not None

    @property
    def size(self) -> int:
        """P; 0 before the first participant."""
        return 0 if self._manifest is None else self._manifest.size

    @property
    def version(self) -> int:
        """Number of merges so far."""
        return 0 if self._store is None else self._store.version

    def declare(self, manifest: Manifest, server: str) -> None:
        """The first manifest settles what is shared; later ones have to fit.

        Raises:
            FingerprintMismatchError: if they do not.
        """
        if self._manifest is not None:
            self._manifest.require_same_parameters(manifest, server)
            return
        if self._initial is not None:
            given = self._initial
            self.fill(
                read_vector(given, manifest.parameters) if isinstance(given, str | Path) else given, manifest
            )
        self._manifest = manifest

    def forget(self) -> None:
        """Undo the first :meth:`declare`, and what it filled."""
        self._manifest = self._store = None

    def fill(self, vector: Vector, manifest: Manifest) -> bool:
        """Start from ``vector``, float32 (P,), unless there are parameters already.

        Returns:
            Whether it was taken.
        """
        if self._store is not None:
            return False
        self._store = MemoryStore(check_vector(vector, manifest))
        return True

    def empty(self) -> None:
        """Undo :meth:`fill`."""
        self._store = None

    def read(self, participant: str, request: DownloadRequest) -> Download:
        """Answer a download; see :func:`lightning_ppdl.server.download.read`."""
        generator = numpy_generator(self._seed, "download", participant, self.version)
        return read(self._filled(), request, self._criterion, generator)

    def context(self, update: SparseUpdate) -> MergeContext:
        """What the merge rule would be told of ``update``, were it merged now."""
        store = self._filled()
        assert self._manifest is not None
        staleness = store.version - update.base_version
        return MergeContext(staleness, self._manifest.quantity, store.parameters)

    def merge(self, update: SparseUpdate) -> None:
        """Apply ``update`` by the merge rule: wholly, or not at all.

        Raises:
            MergeError: if the rule returns what cannot be added.
        """
        store = self._filled()
        change = check_change(self._rule.merge(update, self.context(update)), self._rule, store)
        store.commit(change, update.indices, self._criterion.decay)

    def rehearse(self, update: SparseUpdate) -> None:
        """What :meth:`merge` did to the rule when the rule, or its result, was found at fault."""
        with suppress(Exception):
            self._rule.merge(update, self.context(update))

    def copy(self) -> Vector:
        """float32 (P,)."""
        copied: Vector = self._filled().parameters.copy()
        return copied

    def save(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Everything but the manifest, for :meth:`restore`: a few numbers, and arrays that are not copied."""
        store = self._filled()
        arrays = {"parameters": store.parameters, "stat": store.stat, "changed_at": store.changed_at}
        rule = {f"{_RULE}{name}": array for name, array in self._rule.state().items()}
        return {"version": store.version, "increment": store.increment}, {**arrays, **rule}

    def restore(
        self, manifest: Manifest, numbers: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Go on from :meth:`save`, and from what was declared; whatever ``initial`` says is long past."""
        self._manifest = manifest
        self._store = MemoryStore(arrays["parameters"])
        self._store.stat, self._store.changed_at = arrays["stat"], arrays["changed_at"]
        self._store.version, self._store.increment = numbers["version"], numbers["increment"]
        self._rule.restore(
            {name.removeprefix(_RULE): a for name, a in arrays.items() if name.startswith(_RULE)}
        )

    def _filled(self) -> Store:
        if self._store is None:
            raise JoinRefusedError("the server has no parameters yet: offer_initial() first")
        return self._store
