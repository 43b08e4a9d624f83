"""Numbers as people read them."""

from __future__ import annotations

from lightning_ppdl.server.traffic import Histogram

_REASONS = {
    "AuthenticationError": "no certificate or token that is known",
    "BoundExceededError": "a value beyond the agreed bound",
    "FractionExceededError": "more entries than agreed",
    "IndexOutOfRangeError": "an index outside the parameters",
    "JoinRefusedError": "asked to join on other terms",
    "LateUpdateError": "came after its cycle was closed",
    "LimitExceededError": "more than one participant may have",
    "MalformedUpdateError": "malformed",
    "NonFiniteValueError": "NaN or infinity",
    "RoundSeenBeforeError": "a round merged already, with other content",
    "SessionEndedError": "the session was over",
    "TurnNotHeldError": "turn lost, or not theirs",
    "UnknownParticipantError": "not a member",
    "UnknownVersionError": "based on a version that never was",
    "UnsortedIndicesError": "indices out of order",
    "other": "other reasons",
}


def reason(name: str) -> str:
    """What an error class says, in a few words; the name itself if it is not known.

    >>> reason("MalformedUpdateError"), reason("SomethingNewError")
    ('malformed', 'SomethingNewError')
    """
    return _REASONS.get(name, name)


def count(number: int, noun: str = "") -> str:
    """
    >>> count(1234567), count(1, "upload"), count(0, "upload")
    ('1,234,567', '1 upload', '0 uploads')
    """
    return f"{number:,}" + (f" {noun}{'' if number == 1 else 's'}" if noun else "")


def size(number: int) -> str:
    """Bytes, to three digits.

    >>> size(0), size(999), size(1234), size(99_960), size(999_999), size(5 * 10**15)
    ('0 bytes', '999 bytes', '1.23 kB', '100 kB', '1.00 MB', '5,000 TB')
    """
    if number < 1000:
        return count(number, "byte")
    value, units = number / 1000, ["TB", "GB", "MB", "kB"]
    while len(units) > 1 and float(f"{value:.3g}") >= 1000:
        value /= 1000
        units.pop()
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} {units[-1]}"


def duration(seconds: float) -> str:
    """To the largest unit or two; what is below zero, or no number, counts as zero.

    >>> duration(0.2), duration(59.6), duration(3720), duration(86400 * 3 + 7200)
    ('0 seconds', '1 minute', '1 hour 2 minutes', '3 days 2 hours')
    """
    whole = round(min(seconds, 1e12)) if seconds > 0 else 0
    if whole < 60:
        return count(whole, "second")
    # The smaller unit is told where it still matters: not seconds beside minutes.
    for unit, unit_seconds, noun, smaller in ((86400, 3600, "day", "hour"), (3600, 60, "hour", "minute")):
        if whole >= unit:
            rest = whole % unit // unit_seconds
            return count(whole // unit, noun) + (f" {count(rest, smaller)}" if rest else "")
    return count(whole // 60, "minute")


def ago(seconds: float) -> str:
    """
    >>> ago(0.4), ago(75)
    ('just now', '1 minute ago')
    """
    return "just now" if seconds < 1.5 else f"{duration(seconds)} ago"


def bound(seconds: float) -> str:
    """A bound of the waiting times, short.

    >>> bound(0.1), bound(30.0), bound(900.0), bound(3600.0)
    ('0.1 s', '30 s', '15 min', '1 h')
    """
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 3600 else f"{seconds / 3600:g} h"


def staleness_labels(histogram: Histogram) -> list[str]:
    """Names of the buckets of whole numbers.

    >>> staleness_labels(Histogram((0.0, 1.0, 2.0, 4.0), (0, 0, 0, 0, 0), 0.0))
    ['0', '1', '2', '3\u20134', '5+']
    """
    bounds = [int(value) for value in histogram.bounds]
    labels = [
        f"{high}" if high - low <= 1 else f"{low + 1}\u2013{high}" for low, high in zip([-1, *bounds], bounds)
    ]
    return [*labels, f"{bounds[-1] + 1}+"]


def wait_labels(histogram: Histogram) -> list[str]:
    """Names of the buckets of waiting times.

    >>> wait_labels(Histogram((1.0, 60.0), (0, 0, 0), 0.0))
    ['up to 1 s', 'up to 1 min', 'above 1 min']
    """
    bounds = [bound(value) for value in histogram.bounds]
    return [*(f"up to {value}" for value in bounds), f"above {bounds[-1]}"]
