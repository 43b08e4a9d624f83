"""The server's log on stderr: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from lightning_ppdl.errors import ConfigurationError

FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_PACKAGE = "lightning_ppdl"
_ORDINARY = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""What every record has; whatever else it has was passed in ``extra``."""


class JSONLines(logging.Formatter):
    """One JSON object a line: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, all that was
    passed in ``extra``, and ``exception`` with the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end. What JSON cannot hold is written as text."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        entry = {key: value for key, value in vars(record).items() if key not in _ORDINARY}
        entry = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **entry,
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(form: str, level: str) -> None:
    """Send the log of this process to stderr; of other packages only warnings and errors.

    Args:
        form: One of ``FORMATS``.
        level: One of ``LEVELS``, in capitals or not: the least that this package logs.

    Raises:
        ConfigurationError: for another form or level.
    """
    if form not in FORMATS:
        raise ConfigurationError(f"log={form!r} must be one of {', '.join(FORMATS)}")
    if level.upper() not in LEVELS:
        raise ConfigurationError(f"log_level={level!r} must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JSONLines()
        if form == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(level.upper())
    logging.captureWarnings(True)  # else they would be lines that no program can read
