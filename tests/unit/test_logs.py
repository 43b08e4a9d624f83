"""The server's log: what becomes of a record as text, and as a line of JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server.logs import JSONLines, configure_logging

log = logging.getLogger("lightning_ppdl.test")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("lightning_ppdl")
    before = list(root.handlers), root.level, package.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


def line_of(message: str, *arguments: object, exc_info: Any = None, **extra: object) -> Any:
    record = log.makeRecord(
        log.name, logging.WARNING, "file.py", 1, message, arguments, exc_info, extra=extra
    )
    text = JSONLines().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_holds_what_was_said_and_what_was_passed_beside_it() -> None:
    entry = line_of("%s lost its turn", "clinic-a", event="turn_lost", seconds=60.0)
    time = entry.pop("time")
    assert len(time) == len("2026-01-01T00:00:00.000Z") and time.endswith("Z")
    assert entry == {
        "level": "WARNING",
        "logger": "lightning_ppdl.test",
        "message": "clinic-a lost its turn",
        "event": "turn_lost",
        "seconds": 60.0,
    }


def test_what_json_cannot_hold_is_written_as_text() -> None:
    entry = line_of("two\nlines \u2028 \ud800", where=Path("/a"), missing={"clinic-a": "left"})
    assert entry["message"] == "two\nlines \u2028 \ud800"
    assert (entry["where"], entry["missing"]) == ("/a", {"clinic-a": "left"})


def test_an_error_brings_its_traceback_in_the_same_line() -> None:
    try:
        raise ArithmeticError("cannot go on")
    except ArithmeticError:
        entry = line_of("a request failed", exc_info=sys.exc_info())
    assert entry["exception"].splitlines()[-1] == "ArithmeticError: cannot go on"


def test_levels_apply_to_this_package_and_others_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "debug")
    log.debug("ours")
    logging.getLogger("another").info("not shown")
    logging.getLogger("another").warning("theirs")
    entries = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [entry["message"] for entry in entries] == ["ours", "theirs"]
    configure_logging("text", "WARNING")
    log.info("not shown")
    log.warning("once")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" WARNING once") and line[:2] == "20"


@pytest.mark.parametrize(("form", "level"), [("xml", "INFO"), ("text", "loud"), ("text", "")])
def test_what_there_is_not_is_refused(form: str, level: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^log(_level)?='\w*' must be one of"):
        configure_logging(form, level)
