"""Dates, times and durations of Arrow columns as text, as ISO 8601 writes it.

Arrow counts them from 1970 in 64 bits, which reaches far beyond the years that Python has; a nanosecond it has not.
"""

import re
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
SECONDS_PER_DAY = 24 * 60 * 60
OFFSET = re.compile(r"(?P<sign>[+-])(?P<hours>[01]\d|2[0-3]):(?P<minutes>[0-5]\d)")
UTC_NAMES = frozenset({"UTC", "Z", "GMT", "Etc/UTC", "Etc/GMT"})
SHORTEST_MOMENT = len("2024-05-17T12:30:00")
OUT_OF_RANGE = "outside of the years 1 to 9999"


def write_moment(number: int, unit: str, zone_name: str | None) -> str:
    """Return date and time that are `number` of `unit` after the beginning of 1970, in the zone if there is one.

    Raises:
        ValueError: the zone is not known, or the year is none of Python's.
    """
    seconds, rest = divmod(number, PER_SECOND[unit])
    zone = None if zone_name is None else _zone(zone_name)
    try:
        moment = datetime(1970, 1, 1, tzinfo=None if zone is None else UTC) + timedelta(seconds=seconds)
        text = (moment if zone is None else moment.astimezone(zone)).isoformat()
    except (OverflowError, ValueError) as error:
        raise ValueError(f"a date and time {OUT_OF_RANGE}") from error
    return text[:SHORTEST_MOMENT] + _fraction(rest, PER_SECOND[unit]) + text[SHORTEST_MOMENT:]


def write_date(days: int) -> str:
    """Return the date so many days after the first of 1970.

    Raises:
        ValueError: the year is none of Python's.
    """
    try:
        return (date(1970, 1, 1) + timedelta(days=days)).isoformat()
    except OverflowError as error:
        raise ValueError(f"a date {OUT_OF_RANGE}") from error


def write_time(number: int, unit: str) -> str:
    """Return the time of day that is `number` of `unit` after midnight.

    Raises:
        ValueError: it is not within a day.
    """
    seconds, rest = divmod(number, PER_SECOND[unit])
    if not 0 <= seconds < SECONDS_PER_DAY:
        raise ValueError("a time of day that is not within a day")
    minutes, second = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{_fraction(rest, PER_SECOND[unit])}"


def write_duration(number: int, unit: str) -> str:
    """Return a duration: 90.5 seconds are `PT90.500000S`."""
    seconds, rest = divmod(abs(number), PER_SECOND[unit])
    return f"{'-' if number < 0 else ''}PT{seconds}{_fraction(rest, PER_SECOND[unit])}S"


def write_interval(interval: Any) -> str:
    """Return months, days and nanoseconds as a duration: `P1M2DT0.500000S`."""
    months, days, nanoseconds = interval
    seconds = write_duration(abs(nanoseconds), "ns").removeprefix("PT")
    return f"P{months}M{days}DT{'-' if nanoseconds < 0 else ''}{seconds}"


def _fraction(rest: int, per_second: int) -> str:
    """Return the part of a second as Python writes it: nothing, six digits, or nine where it needs them."""
    nanoseconds = rest * (10**9 // per_second)
    if nanoseconds % 1000:
        return f".{nanoseconds:09}"
    return f".{nanoseconds // 1000:06}" if nanoseconds else ""


@cache
def _zone(name: str) -> tzinfo:
    """Return the time zone that Arrow calls by an offset or by its name."""
    if found := OFFSET.fullmatch(name):
        offset = timedelta(hours=int(found["hours"]), minutes=int(found["minutes"]))
        return timezone(-offset if found["sign"] == "-" else offset)
    if name in UTC_NAMES:
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # not there, no name of one, or a folder of them
        raise ValueError(
            f"a time in the zone {name!r}, which is not known here (pip install tzdata has them all)"
        ) from error
