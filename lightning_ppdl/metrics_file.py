"""What a participant logs, as a table that outlives its process."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger


class MetricsFile(Logger):
    """A CSV file with a row for whatever is logged: written at once, and added to by a further run.

    Lightning's own would begin the file anew, and keep up to a hundred rows in memory.

    Args:
        path: The file; its directory is made when the first row comes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not part of the table."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row; columns that it is the first to have are added too."""
        row = {"step": step, **metrics}
        if self._columns is None or not row.keys() <= set(self._columns):
            self._widen(list(row))
        assert self._columns is not None
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _widen(self, columns: list[str]) -> None:
        rows: list[dict[str, str]] = []
        known: list[str] = []
        if self._path.is_file():
            with self._path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows, known = list(reader), list(reader.fieldnames or ())
        self._columns = list(dict.fromkeys([*known, *columns]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the file, and then in its place: who is killed in between has lost nothing.
        draft = self._path.with_suffix(".tmp")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(self._path)
