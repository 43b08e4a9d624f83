"""The table of what a participant logs."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_ppdl.metrics_file import MetricsFile


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_there_at_once_and_a_further_run_adds_to_them(tmp_path: Path) -> None:
    path = tmp_path / "anna" / "metrics.csv"
    first = MetricsFile(path)
    first.log_metrics({"loss": 0.5}, step=1)
    assert rows(path) == [{"step": "1", "loss": "0.5"}]
    first.log_metrics({"round": 1.0}, step=2)
    first.log_metrics({"loss": 0.25}, step=3)
    second = MetricsFile(path)
    second.log_metrics({"loss": 0.1, "epsilon": 2.0}, step=4)
    assert rows(path) == [
        {"step": "1", "loss": "0.5", "round": "", "epsilon": ""},
        {"step": "2", "loss": "", "round": "1.0", "epsilon": ""},
        {"step": "3", "loss": "0.25", "round": "", "epsilon": ""},
        {"step": "4", "loss": "0.1", "round": "", "epsilon": "2.0"},
    ]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]
