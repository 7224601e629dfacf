"""Format dates, times and durations of Arrow columns as ISO 8601 text.

Arrow counts from 1970 in 64 bits, far beyond the years that `datetime` supports, and in nanoseconds, which it lacks.
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
WHOLE_SECONDS_LENGTH = len("2024-05-17T12:30:00")
OUT_OF_RANGE = "outside of the years 1 to 9999"


def iso_timestamp(count: int, unit: str, zone_name: str | None) -> str:
    """Return the date and time `count` units after the beginning of 1970, in the time zone if there is one.

    Raises:
        ValueError: the zone is unknown, or the year is out of range.
    """
    seconds, rest = divmod(count, PER_SECOND[unit])
    zone = None if zone_name is None else _zone(zone_name)
    try:
        moment = datetime(1970, 1, 1, tzinfo=None if zone is None else UTC) + timedelta(seconds=seconds)
        text = (moment if zone is None else moment.astimezone(zone)).isoformat()
    except (OverflowError, ValueError) as error:
        raise ValueError(f"a date and time {OUT_OF_RANGE}") from error
    return text[:WHOLE_SECONDS_LENGTH] + _fraction(rest, PER_SECOND[unit]) + text[WHOLE_SECONDS_LENGTH:]


def iso_date(days: int) -> str:
    """Return the date `days` days after 1970-01-01.

    Raises:
        ValueError: the year is out of range.
    """
    try:
        return (date(1970, 1, 1) + timedelta(days=days)).isoformat()
    except OverflowError as error:
        raise ValueError(f"a date {OUT_OF_RANGE}") from error


def iso_time(count: int, unit: str) -> str:
    """Return the time of day `count` units after midnight.

    Raises:
        ValueError: it is not within a day.
    """
    seconds, rest = divmod(count, PER_SECOND[unit])
    if not 0 <= seconds < SECONDS_PER_DAY:
        raise ValueError("a time of day that is not within a day")
    minutes, second = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{_fraction(rest, PER_SECOND[unit])}"


def iso_duration(count: int, unit: str) -> str:
    """Return a duration of `count` units: 90.5 seconds are `PT90.500000S`."""
    seconds, rest = divmod(abs(count), PER_SECOND[unit])
    return f"{'-' if count < 0 else ''}PT{seconds}{_fraction(rest, PER_SECOND[unit])}S"


def iso_interval(interval: Any) -> str:
    """Return months, days and nanoseconds as a duration: `P1M2DT0.500000S`."""
    months, days, nanoseconds = interval
    seconds = iso_duration(abs(nanoseconds), "ns").removeprefix("PT")
    return f"P{months}M{days}DT{'-' if nanoseconds < 0 else ''}{seconds}"


def _fraction(rest: int, per_second: int) -> str:
    """Return the fraction of a second as Python writes it: nothing, six digits, or nine if needed."""
    nanoseconds = rest * (10**9 // per_second)
    if nanoseconds % 1000:
        return f".{nanoseconds:09}"
    return f".{nanoseconds // 1000:06}" if nanoseconds else ""


@cache
def _zone(name: str) -> tzinfo:
    """Return the time zone with Arrow's name for it: an offset or a name."""
    if match := OFFSET.fullmatch(name):
        offset = timedelta(hours=int(match["hours"]), minutes=int(match["minutes"]))
        return timezone(-offset if match["sign"] == "-" else offset)
    if name in UTC_NAMES:
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # unknown, not a valid name, or a folder of zones
        raise ValueError(
            f"a time in the zone {name!r}, which is unknown here (pip install tzdata provides them all)"
        ) from error
