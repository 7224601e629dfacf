"""The error band of a swept run, which tables and plots show. Imports no torch."""

from qlora_cli.memory.prediction import MemoryReport, SweepPoint


def process_band(report: MemoryReport, point: SweepPoint) -> tuple[int, int]:
    """Return the lower and the upper end of the band of `point.process_bytes`, in bytes.

    The band is as wide as that of the run itself: a share of reserved memory, and the uncertainty of the CUDA context.
    """
    own = report.predicted
    low = point.reserved_bytes * own.reserved_low_bytes / own.reserved_bytes
    high = point.reserved_bytes * own.reserved_high_bytes / own.reserved_bytes
    outside_low = own.process_low_bytes - own.reserved_low_bytes
    outside_high = own.process_high_bytes - own.reserved_high_bytes
    return round(low) + outside_low, round(high) + outside_high


def verdict(report: MemoryReport, point: SweepPoint, usable_bytes: int) -> str:
    """Return whether a swept run fits: `yes`, `tight` or `no`, as `suggestions.judge_fit` judges a run."""
    own = report.predicted
    if process_band(report, point)[1] <= usable_bytes:
        return "yes"
    allocated_low = point.allocated_bytes * own.allocated_low_bytes / own.allocated_bytes
    return "no" if allocated_low + report.components.context_bytes > usable_bytes else "tight"
