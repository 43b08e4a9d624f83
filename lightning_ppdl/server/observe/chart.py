"""The two kinds of pictures on the status page, as inline SVG and HTML, without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lightning_ppdl.server.observe.words import count
from lightning_ppdl.server.traffic import MINUTES, Histogram

_HEIGHT = 100
_GAP = 0.22


def uploads_chart(per_minute: Sequence[int], started_minutes_ago: float) -> str:
    """Bars of uploads per minute, oldest at the left, with axes; shaded where the server did not run yet.

    Args:
        per_minute: Of the last minutes; the last one is not over, and drawn pale.
        started_minutes_ago: Since when the server runs.
    """
    top = _round_up(max(per_minute))
    last = len(per_minute) - 1
    bars = "".join(
        f'<rect x="{at + _GAP / 2:g}" y="{_HEIGHT * (1 - number / top):.2f}" width="{1 - _GAP:g}" '
        f'height="{_HEIGHT * number / top:.2f}"{" class=now" if at == last else ""}>'
        f"<title>{count(number, 'upload')}, {_when(last - at)}</title></rect>"
        for at, number in enumerate(per_minute)
        if number
    )
    before = max(0, last - math.floor(min(started_minutes_ago, MINUTES)))
    shade = f'<rect class=before width="{before}" height="{_HEIGHT}"/>' if before else ""
    lines = "".join(f'<path d="M0 {y}H{len(per_minute)}"/>' for y in (0, _HEIGHT / 2, _HEIGHT))
    # The width is stretched to the page's; numbers and words are HTML, so that they are not.
    return (
        f"<div class=chart><div class=scale aria-hidden=true><span>{count(top)}</span>"
        f"<span>{count(top // 2) if top % 2 == 0 else ''}</span><span>0</span></div>"
        f'<svg viewBox="0 0 {len(per_minute)} {_HEIGHT}" preserveAspectRatio=none role=img '
        f'aria-label="Uploads per minute over the last two hours: {sum(per_minute)} in all, at most '
        f'{max(per_minute)} in one minute">{shade}<g class=grid>{lines}</g><g class=bars>{bars}</g></svg>'
        f"<div class=time aria-hidden=true><span>2 hours ago</span><span>90 min</span><span>1 hour</span>"
        f"<span>30 min</span><span>now</span></div></div>"
    )


def distribution(histogram: Histogram, labels: Sequence[str]) -> str:
    """A row for each bucket from the first to the last that is not empty; that of the median stands out.

    Args:
        histogram: With one value at least.
        labels: Of its buckets.
    """
    most, total = max(histogram.counts), histogram.count
    filled = [at for at, number in enumerate(histogram.counts) if number]
    rows = []
    for at in range(filled[0], filled[-1] + 1):
        number = histogram.counts[at]
        width = 100 * number / most
        marked = " class=median" if at == histogram.median_bucket else ""
        rows.append(
            f"<tr{marked}><th scope=row>{labels[at]}</th><td class=bar><svg viewBox='0 0 100 1' "
            f"preserveAspectRatio=none aria-hidden=true><rect class=track width=100 height=1 />"
            f"<rect width='{width:.1f}' height=1 /></svg></td>"
            f"<td title='{count(number)}'>{escape(_share(number, total))}</td></tr>"
        )
    return f"<table class=distribution>{''.join(rows)}</table>"


def _share(number: int, total: int) -> str:
    """
    >>> _share(0, 7), _share(1, 7), _share(1, 1000), _share(999, 1000), _share(7, 7)
    ('0%', '14%', '<1%', '>99%', '100%')
    """
    percent = 100 * number / total
    if 0 < percent < 1:
        return "<1%"
    if 99 < percent < 100:
        return ">99%"
    return f"{percent:.0f}%"


def _round_up(number: int) -> int:
    """The next of 2, 4, 6, 8, 10, 20, 40, ...: the top of an axis that is halved.

    >>> [_round_up(number) for number in (0, 2, 3, 9, 11, 57, 401)]
    [2, 2, 4, 10, 20, 60, 600]
    """
    power = 1
    while True:
        for step in (2, 4, 6, 8, 10):
            if number <= step * power:
                return step * power
        power *= 10


def _when(minutes_ago: int) -> str:
    return "in this minute" if minutes_ago == 0 else f"{count(minutes_ago, 'minute')} ago"
