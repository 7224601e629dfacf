"""How long the steps of runs took on this machine, as a multiple of their prediction, and what that corrects.

A file for each device, next to its measured rates, has a line for each run. A line is appended in one write, so that
runs at the same time do not disturb each other. Imports no torch.
"""

import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlora_cli.units import counted
from qlora_cli.writing import PRIVATE_FILE, append_line, end_line, private_folder, write_file

NUM_RUNS = 5  # the latest of a kind, whose median counts
# The ends of the band beyond the spread of these ratios, as a share: for other rows, models and settings. Twice that
# after a single run, whose spread is not known. Both are choices; steps on a CPU differed by 7 % (decision 38).
MARGIN = 0.10
LEAST_RATIO, LARGEST_RATIO = 0.1, 10.0  # beyond, something else is wrong, or the file is not ours
MAX_LINES = 200


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """What runs have in common whose ratio holds for one another.

    Attributes:
        device: The name under which its rates are stored.
        kind: How the layers are computed, in words.
        limit: `host` if its dispatch limits a step on a GPU, else `device`.
        basis: A digest of the rates and the code that the prediction is made with.
    """

    device: str
    kind: str
    limit: str
    basis: str


@dataclass(frozen=True, kw_only=True)
class RunRatio:
    """The seconds of a step of one run, as a multiple of those predicted without any correction."""

    key: RunKey
    ratio: float
    measured_on: str
    versions: tuple[str, ...]

    @property
    def is_plausible(self) -> bool:
        """Whether the ratio may be that of a step; false for nan."""
        return LEAST_RATIO <= self.ratio <= LARGEST_RATIO


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The factor by which predicted seconds are corrected, and the ends of the band as shares of the result."""

    ratio: float
    low: float
    high: float
    num_runs: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Correction":
        """Return the correction by the ratios of some runs, the latest last."""
        latest = ratios[-NUM_RUNS:]
        middle, margin = statistics.median(latest), MARGIN * (1 + 1 / len(latest))
        return cls(
            ratio=middle,
            low=min(latest) / middle * (1 - margin),
            high=max(latest) / middle * (1 + margin),
            num_runs=len(latest),
        )


def described(rates: str, ratio: float | None, num_runs: int) -> str:
    """Return where rates come from, with their correction, in words."""
    return rates if ratio is None else f"{rates}, corrected by {counted(num_runs, 'run')} here: times {ratio:.2f}"


def store_ratio(file: Path, key: RunKey, ratio: float, versions: tuple[str, ...]) -> None:
    """Append the ratio of a run that was measured today to the file of its device.

    Raises:
        OSError: it can't be written.
    """
    today = datetime.now(UTC).date().isoformat()
    line = json.dumps(asdict(RunRatio(key=key, ratio=ratio, measured_on=today, versions=versions)))
    private_folder(file.parent)
    end_line(file)
    append_line(file, line)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(lines) > MAX_LINES:  # a line that another run appends right now is lost, and no more
        write_file(file, "\n".join(lines[-MAX_LINES // 2 :]) + "\n", mode=PRIVATE_FILE)


def read_ratios(text: str, device: str, versions: tuple[str, ...]) -> tuple[tuple[RunRatio, ...], str]:
    """Return the ratios of a device that hold with these versions, and why others in its file do not, in words."""
    runs, num_damaged, num_old = list[RunRatio](), 0, 0
    for line in text.splitlines():
        try:
            run = _reader().validate_json(line)
        except ValidationError:
            num_damaged += 1
            continue
        if run.key.device != device or not run.is_plausible:
            num_damaged += 1
        elif run.versions != versions:
            num_old += 1
        else:
            runs.append(run)
    notes = [f"{num_damaged} can't be read"] if num_damaged else []
    if num_old and not runs:
        notes.append(f"{num_old} had other versions of the libraries or the driver")
    return tuple(runs), f"of the runs that correct predicted times here, {' and '.join(notes)}" if notes else ""


@functools.cache
def _reader() -> TypeAdapter[RunRatio]:
    return TypeAdapter(RunRatio)
