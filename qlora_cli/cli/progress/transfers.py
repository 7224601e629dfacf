"""Describe the transfer of bytes: its progress, its speed and the remaining time."""

from dataclasses import dataclass

from qlora_cli.events import BytesDone
from qlora_cli.units import format_bytes, format_duration

# By kind: the verb during the transfer, and the one at its end.
TRANSFERS = {
    "download": ("Downloading", "downloaded"),
    "quantize": ("Quantizing", "quantized"),
    "load": ("Loading", "loaded"),
    "merge": ("Merging", "merged"),
}


@dataclass(kw_only=True)
class Transfer:
    """A transfer in progress: when it started, and the bytes present then, which do not count towards its speed."""

    started: float
    first_bytes: int
    last_line: float = -float("inf")

    def describe(self, event: BytesDone, now: float) -> str:
        """Return its progress and, after a while, its speed and the remaining time."""
        line = (
            f"{TRANSFERS[event.kind][0]}: {format_bytes(event.done_bytes)} of {format_bytes(event.total_bytes)} "
            f"({event.done_bytes / event.total_bytes:.0%})"
        )
        speed = self._bytes_per_second(event, now)
        if not speed:
            return line
        left = format_duration((event.total_bytes - event.done_bytes) / speed)
        return f"{line}, {format_bytes(round(speed))}/s, {left} left"

    def describe_end(self, event: BytesDone, now: float) -> str:
        """Return its size, its duration and its speed."""
        line = f"{format_bytes(event.total_bytes)} {TRANSFERS[event.kind][1]}"
        speed = self._bytes_per_second(event, now)
        return f"{line} in {format_duration(now - self.started)} ({format_bytes(round(speed))}/s)" if speed else line

    def _bytes_per_second(self, event: BytesDone, now: float) -> float:
        seconds = now - self.started
        return max(0, event.done_bytes - self.first_bytes) / seconds if seconds > 0 else 0.0
