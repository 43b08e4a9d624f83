"""Processes that tests start."""

from __future__ import annotations

import signal


def hears_ctrl_c() -> None:
    """As ``preexec_fn``: what was started in the background ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
