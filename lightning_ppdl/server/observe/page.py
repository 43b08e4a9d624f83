"""The status page: one HTML document with nothing to load, for people."""

from __future__ import annotations

import base64
import hashlib
import math
from html import escape

from lightning_ppdl.records import MemberStatus
from lightning_ppdl.server.observe import words
from lightning_ppdl.server.observe.chart import distribution, uploads_chart
from lightning_ppdl.server.observe.status import ServiceStatus
from lightning_ppdl.server.observe.style import STYLE
from lightning_ppdl.server.traffic import TrafficStatus

REFRESH_SECONDS = 5
STYLE_HASH = "sha256-" + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
"""Lets this style and no other into the page, as a source of a Content-Security-Policy."""

_MOST_ROWS = 500
_MANY_ROWS = 15
_MOST_AWAITED = 8

# A server in the middle of those that take part.
_MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48" fill="none" stroke="#1a8a66" '
    'stroke-width="2.4" aria-hidden="true"><path d="M24 24V8M24 24l14 8M24 24l-14 8" stroke-opacity=".55"/>'
    '<circle cx="24" cy="24" r="7" fill="#1a8a66" stroke="none"/><circle cx="24" cy="7" r="4"/>'
    '<circle cx="39.5" cy="33" r="4"/><circle cx="8.5" cy="33" r="4"/></svg>'
)
_ICON = "data:image/svg+xml;base64," + base64.b64encode(_MARK.encode()).decode()


def render(status: ServiceStatus) -> bytes:
    """The page that ``/`` answers with, UTF-8. Every name in it is escaped."""
    here = sum(member.present for member in status.members)
    traffic = status.traffic
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}"><meta name="robots" content="noindex">'
        f'<title>{_title(status, here)}</title><link rel="icon" href="{_ICON}"><style>{STYLE}</style></head>'
        f"<body><main>{_header(status)}{_turn(status)}"
        f'<div class="grid2"><div class="side">{_uploads(status)}{_members(status, here)}</div>'
        f'<div class="side">{_staleness(traffic)}{_waits(traffic)}{_rejections(traffic)}</div></div>'
        f"{_footer()}</main></body></html>\n"
    ).encode("utf-8", "replace")


def _title(status: ServiceStatus, here: int) -> str:
    return f"{here} of {len(status.members)} present \u00b7 study {escape(status.study[:8])}"


def _header(status: ServiceStatus) -> str:
    if status.journal_bytes is not None:
        kept = f"journal of {words.size(status.journal_bytes)} on disk" + (
            "" if status.durable else ", not durable"
        )
    else:
        kept = "survives a restart" if status.durable else "in memory only: a restart begins anew"
    return (
        f"<header>{_MARK}<div><h1>Parameter server</h1><p>study <code>{escape(status.study[:8])}</code> "
        f"\u00b7 {escape(status.protocol)} \u00b7 {escape(status.merge)}</p></div>"
        f'<p class="right">up for <b>{words.duration(status.started_seconds_ago)}</b><br>{kept}</p></header>'
    )


def _turn(status: ServiceStatus) -> str:
    """Who is awaited, and the figures that matter most."""
    traffic = status.traffic
    figures = (
        ("Version", words.count(status.version), "merges"),
        ("Parameters", words.count(status.parameters) if status.parameters else "\u2013", "shared"),
        ("Uploads", words.count(traffic.uploads), words.size(traffic.uploaded_bytes)),
        ("Downloads", words.count(traffic.downloads), words.size(traffic.downloaded_bytes)),
    )
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{under}</small></dd></div>" for name, value, under in figures
    )
    kind, content = _awaited(status)
    return (
        f'<section class="turn {kind}"><div><h2>Whose turn</h2>{content}</div>'
        f'<dl class="figures">{cells}</dl></section>'
    )


def _awaited(status: ServiceStatus) -> tuple[str, str]:
    """A class and a few words for it."""
    heard = {member.name: member for member in status.members}
    names = status.awaited
    if len(names) == 1:
        return "waiting", (
            f'<p class="who">Awaiting <bdi>{escape(names[0])}</bdi></p><p>{_heard(heard.get(names[0]))}</p>'
        )
    if names:
        rows = "".join(
            f"<li><bdi>{escape(name)}</bdi>, {_heard(heard.get(name))}</li>" for name in names[:_MOST_AWAITED]
        )
        if len(names) > _MOST_AWAITED:
            rows += f"<li>and {words.count(len(names) - _MOST_AWAITED)} more</li>"
        return "waiting", f'<p class="who">Awaiting {words.count(len(names))} participants</p><ul>{rows}</ul>'
    if not status.members:
        return "", '<p class="who">Nobody has joined yet</p><p>The server is up and ready.</p>'
    if not any(member.present for member in status.members):
        last = min(member.idle_seconds for member in status.members)
        return "", f'<p class="who">Everybody is away</p><p>The last was heard {words.ago(last)}.</p>'
    return "open", '<p class="who">Nobody is awaited</p><p>Whoever is ready may start a round.</p>'


def _heard(member: MemberStatus | None) -> str:
    if member is None:
        return "not joined yet"
    return ("" if member.present else "away, ") + f"last heard {words.ago(member.idle_seconds)}"


def _uploads(status: ServiceStatus) -> str:
    per_minute = status.traffic.uploads_per_minute
    total = sum(per_minute)
    minutes_ago = status.started_seconds_ago / 60 if math.isfinite(status.started_seconds_ago) else 0.0
    return _section(
        "Uploads per minute",
        uploads_chart(per_minute, minutes_ago),
        f"{words.count(total) if total else 'none'} in the last two hours",
    )


def _members(status: ServiceStatus, here: int) -> str:
    if not status.members:
        return (
            f'<section class="nobody">{_MARK}<p class="lead">No participants yet</p><p>Each appears here '
            f"when it joins, with its rounds and when it was last heard.</p></section>"
        )
    awaited = frozenset(status.awaited)
    # Those that are here first; among them, and among the others, in the order in which they joined.
    ordered = sorted(status.members, key=lambda member: not member.present)
    rows = "".join(_row(member, member.name in awaited) for member in ordered[:_MOST_ROWS])
    more = len(ordered) - _MOST_ROWS
    kind = "members many" if len(ordered) > _MANY_ROWS else "members"
    return _section(
        "Participants",
        f'<table class="{kind}"><thead><tr><th>Name</th><th>State</th><th class="number">Rounds</th>'
        f'<th class="heard number">Last heard</th></tr></thead><tbody>{rows}</tbody></table>'
        + (f'<p class="more">and {words.count(more)} more; see status.json</p>' if more > 0 else ""),
        f"{words.count(here)} of {words.count(len(ordered))} present",
    )


def _row(member: MemberStatus, awaited: bool) -> str:
    kind, state = ("here", "present") if member.present else ("away", "away")
    tag = '<span class="tag">awaited</span>' if awaited else ""
    return (
        f'<tr class="{kind}"><td><bdi>{escape(member.name)}</bdi>{tag}</td>'
        f'<td class="state"><span class="dot"></span><i>{state}</i></td>'
        f'<td class="number">{words.count(member.rounds)}</td>'
        f'<td class="heard number">{words.ago(member.idle_seconds)}</td></tr>'
    )


def _staleness(traffic: TrafficStatus) -> str:
    histogram, title = traffic.staleness, "Staleness of uploads"
    if histogram.median_bucket is None:
        return _section(title, '<p class="empty">No uploads yet.</p>')
    labels = words.staleness_labels(histogram)
    mean = histogram.total / histogram.count
    aside = f"median {labels[histogram.median_bucket]}, mean {mean:.1f}"
    return _section(title, distribution(histogram, labels), aside)


def _waits(traffic: TrafficStatus) -> str:
    histogram, title = traffic.turn_wait_seconds, "Wait for the turn"
    if histogram.median_bucket is None:
        return _section(title, '<p class="empty">Nobody has waited for a turn yet.</p>')
    labels = words.wait_labels(histogram)
    return _section(title, distribution(histogram, labels), f"median {labels[histogram.median_bucket]}")


def _rejections(traffic: TrafficStatus) -> str:
    if not traffic.rejections:
        return _section("Refused requests", '<p class="empty">None.</p>')
    most = sorted(traffic.rejections, key=lambda item: -item[1])
    rows = "".join(
        f"<dt>{escape(words.reason(name))}{_name_of(name)}</dt><dd>{words.count(number)}</dd>"
        for name, number in most
    )
    total = words.count(sum(number for _, number in most))
    return _section("Refused requests", f'<dl class="reasons">{rows}</dl>', f"{total} in all")


def _name_of(reason: str) -> str:
    return "" if reason in (words.reason(reason), "other") else f"<code>{escape(reason)}</code>"


def _section(title: str, content: str, aside: str = "") -> str:
    beside = f"<p>{aside}</p>" if aside else ""
    return f'<section><div class="head"><h2>{title}</h2>{beside}</div>{content}</section>'


def _footer() -> str:
    return (
        "<footer><p>No parameter value is shown here. Who takes part, and when, is: show it only to those "
        "who may know.</p>"
        f'<p>read anew every {REFRESH_SECONDS} seconds \u00b7 <a href="/status.json">JSON</a> \u00b7 '
        '<a href="/metrics">Prometheus metrics</a></p></footer>'
    )
