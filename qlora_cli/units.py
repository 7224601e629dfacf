"""Format numbers for people: bytes in GiB (1024³), counts with separators, durations.

Every number can be formatted: figures from untrusted files are bounded when read, but may be infinite or NaN.
"""

from typing import Annotated

from pydantic import Field

GIB = 1024**3
MIB = 1024**2
KIB = 1024
LARGEST = 2**63 - 1  # the largest number of steps, tokens or bytes in a file
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]


def format_bytes(num_bytes: int) -> str:
    """Return `num_bytes` in the largest binary unit that keeps it at or above one: `3.36 GiB`."""
    if abs(num_bytes) > LARGEST:
        return f"more than {LARGEST // GIB:,} GiB"
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def format_count(count: int) -> str:
    """Return a count as in the names of models: `6.74B`, `159.91M`, `512`."""
    if abs(count) > LARGEST:
        return f"more than {LARGEST // 10**9:,}B"
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:,}"


def format_rate(rate: float, unit: str) -> str:
    """Return a rate in the largest unit that keeps it at or above one: `31.2 GFLOP/s`, for the unit `FLOP`."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= size:
            return f"{rate / size:.1f} {prefix}{unit}/s"
    return f"{rate:,.1f} {unit}/s"


def format_duration(seconds: float) -> str:
    """Return seconds as `0.42 s`, `1:05` (minutes) or `2:03:09` (hours)."""
    if not -LARGEST <= seconds <= LARGEST:  # NaN too
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, noun: str) -> str:
    """Return a number with a noun: `1 row`, `1,500 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
