"""Ask the same prediction for other values of a setting: the largest that fits on a GPU, or every one in a table."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from pydantic import TypeAdapter, ValidationError

from qlora_cli.errors import UsageError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, Solution, SweepPoint
from qlora_cli.settings.choices import Solvable
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import varied_run

# Predicts a run on a GPU; raises a QloraError where the settings can't work together.
Ask = Callable[[EstimateSettings, Gpu], Estimate]

# What can be solved for and swept, by the flag's name without dashes.
SETTINGS = {
    Solvable.MAX_LENGTH.value: "data.max_length",
    Solvable.MICRO_BATCH_SIZE.value: "training.micro_batch_size",
    Solvable.RANK.value: "lora.rank",
}
LENGTH_STEP = 64  # kernels work in tiles of 64 tokens or more, so that lengths between save next to nothing
MOST_TOKENS, MOST_ROWS, MOST_RANK = 2**20, 1024, 4096
MOST_GROWTH = 8  # times, from one value that fits to the next that is asked
NUM_INTERPOLATED = 8  # asks, before a search goes on by halves: it then takes no more than ten or so others


@dataclass(frozen=True)
class Point:
    """A position in a list of values, and the bytes that are left of the GPU there; negative if it does not fit."""

    at: int
    room: float


def room(estimate: Estimate, gpu: Gpu) -> int:
    """Return the bytes that the upper end of the error band leaves of what is usable: a run fits if none lack."""
    return gpu.usable_bytes - estimate.predicted.process_high_bytes


def solve(setting: str, settings: EstimateSettings, gpu: Gpu, ask: Ask, *, most: int | None) -> Solution:
    """Return the largest value of `setting` with which the run fits on `gpu`, whole error band included.

    Lengths are tried in multiples of 64, ranks in multiples of 8 (and 1, 2, 4). Everything else stays as it is, the
    accumulation of micro-batches too. `most` is the positions of the model, where they are known; it bounds lengths.

    Raises:
        UsageError: `setting` can't be solved for.
        QloraError: the settings can't work together, with any value or with one that was tried.
    """
    _check_known(setting)
    values, bound = _values(setting, most)
    process_bytes: dict[int, int] = {}

    def room_at(position: int) -> int:
        estimate = ask(with_value(settings, setting, values[position]), gpu)
        process_bytes[position] = estimate.predicted.process_bytes
        return room(estimate, gpu)

    start = max(bisect_right(values, _value(settings, setting)) - 1, 0)
    best = _climb(start, len(values) - 1, room_at)
    return Solution(
        setting=setting,
        gpu=gpu.name,
        value=None if best is None else values[best],
        process_bytes=None if best is None else process_bytes[best],
        limited_by=bound if best == len(values) - 1 else "memory",
    )


def sweep(
    values: Mapping[str, tuple[int, ...]], settings: EstimateSettings, gpu: Gpu, ask: Ask
) -> tuple[SweepPoint, ...]:
    """Return what the run takes with every combination of `values`, the last setting changing fastest.

    Raises:
        UsageError: a setting can't be swept, or does not take one of its values.
        QloraError: the settings can't work together with one of the values.
    """
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    changed = []
    for combination in combinations:  # a wrong value is told before the first second is spent
        variant = settings
        for setting, value in combination.items():
            variant = with_value(variant, setting, value)
        changed.append(variant)
    return tuple(_point(point, ask(variant, gpu)) for point, variant in zip(combinations, changed, strict=True))


def _point(values: dict[str, int], estimate: Estimate) -> SweepPoint:
    return SweepPoint(
        values=values,
        allocated_bytes=estimate.predicted.allocated_bytes,
        reserved_bytes=estimate.predicted.reserved_bytes,
        process_bytes=estimate.predicted.process_bytes,
        ruling_phase=estimate.ruling_phase,
    )


def with_value(settings: EstimateSettings, setting: str, value: int) -> EstimateSettings:
    """Return the settings with another value of `setting`, which is named as its flag without dashes.

    Raises:
        UsageError: there is no such setting here, or it does not take the value.
    """
    _check_known(setting)
    section, key = SETTINGS[setting].split(".")
    field = type(getattr(settings, section)).model_fields[key]
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise UsageError(f"{setting} {expected}, got {value}", hint=field.description) from None
    return varied_run(settings, {SETTINGS[setting]: value})


def narrow(low: Point, high: Point, room_at: Callable[[int], float], *, most_asks: int | None = None) -> int:
    """Return the largest position that has room, between `low`, which has some, and `high`, which lacks some.

    By interpolation, since memory grows nearly linearly: false position, with the weight of an end halved that stays
    twice (the Illinois method: Dowell and Jarratt, 1971), which a curve does not slow down. After some asks by
    halves. With `most_asks`, the largest of the positions that were asked.
    """
    assert low.room >= 0 > high.room, (low, high)
    num_asks = side = 0
    while high.at - low.at > 1 and num_asks != most_asks:
        share = low.room / (low.room - high.room) if num_asks < NUM_INTERPOLATED else 0.5
        at = min(max(low.at + int((high.at - low.at) * share), low.at + 1), high.at - 1)
        here = Point(at, room_at(at))
        num_asks += 1
        if here.room >= 0:
            low, high = here, replace(high, room=high.room / 2) if side > 0 else high
            side = 1
        else:
            low, high = replace(low, room=low.room / 2) if side < 0 else low, here
            side = -1
    return low.at


def _climb(start: int, top: int, room_at: Callable[[int], float]) -> int | None:
    """Return the largest position up to `top` that has room, looked for from `start` on; None if none has."""
    low = before = Point(start, room_at(start))
    if low.room < 0:
        least = Point(0, room_at(0)) if start else low
        return narrow(least, low, room_at) if least.room >= 0 else None
    while low.at < top:
        at = min(_beyond(before, low), top)
        here = Point(at, room_at(at))
        if here.room < 0:
            return narrow(low, here, room_at)
        before, low = low, here
    return top


def _beyond(before: Point, low: Point) -> int:
    """Return where to look next above `low`: just beyond where the line through both runs out of room."""
    if before.room <= low.room:  # one point only, or no growth yet: twice the value
        return 2 * low.at + 1
    num_steps = ceil(low.room * (low.at - before.at) / (before.room - low.room))
    return min(low.at + num_steps + 1, MOST_GROWTH * (low.at + 1))


def _check_known(setting: str) -> None:
    if setting not in SETTINGS:
        raise UsageError(f"{setting!r} can't be varied here", hint=f"Vary one of {', '.join(SETTINGS)}.")


def _value(settings: EstimateSettings, setting: str) -> int:
    section, key = SETTINGS[setting].split(".")
    value = getattr(getattr(settings, section), key)
    assert isinstance(value, int)
    return value


def _values(setting: str, most: int | None) -> tuple[Sequence[int], str]:
    """Return the values of `setting` that are tried, smallest first, and what bounds them at the top."""
    if setting == "micro-batch-size":
        return range(1, MOST_ROWS + 1), f"{MOST_ROWS:,} rows, the most that are tried"
    if setting == "rank":
        return (1, 2, 4, *range(8, MOST_RANK + 1, 8)), "the largest rank that is allowed"
    if most is None:
        return range(LENGTH_STEP, MOST_TOKENS + 1, LENGTH_STEP), f"{MOST_TOKENS:,} tokens, the most that are tried"
    return (*range(LENGTH_STEP, most, LENGTH_STEP), most), "the positions of the model"
