"""Repeat a prediction with other values of a setting: find the largest that fits on a GPU, or sweep over many."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from pydantic import ValidationError

from qlora_cli.errors import UsageError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, Solution, SweepPoint, figures_of_run
from qlora_cli.memory.request import Predict
from qlora_cli.settings.choices import Solvable
from qlora_cli.settings.models import EstimateSettings, value_adapter
from qlora_cli.settings.section import Section
from qlora_cli.settings.settle import with_settings

# What can be solved for and swept, by the flag's name without dashes.
SETTINGS = {
    Solvable.MAX_LENGTH.value: "data.max_length",
    Solvable.MICRO_BATCH_SIZE.value: "training.micro_batch_size",
    Solvable.RANK.value: "lora.rank",
}
LENGTH_STEP = 64  # kernels work in tiles of 64 tokens or more, so lengths in between save next to nothing
MAX_TOKENS, MAX_ROWS, MAX_RANK = 2**20, 1024, 4096
MAX_GROWTH = 8  # from one value that fits to the next that is tried, as a factor
NUM_INTERPOLATED = 8  # predictions before the search bisects, which takes at most about ten more


@dataclass(frozen=True)
class Point:
    """A position in a list of values, and the bytes that its value leaves free; negative if the run does not fit."""

    at: int
    headroom: float


def spare_bytes(estimate: Estimate, gpu: Gpu) -> int:
    """Return what weights may take in addition so that the run fits on `gpu` with its whole error band.

    The upper end of the band grows in proportion to what is reserved.
    """
    figures = estimate.predicted
    return max(0, headroom_bytes(estimate, gpu) * figures.reserved_bytes // figures.reserved_high_bytes)


def headroom_bytes(estimate: Estimate, gpu: Gpu) -> int:
    """Return the usable bytes left at the upper end of the error band; a run fits unless it is negative."""
    return gpu.usable_bytes - estimate.predicted.process_high_bytes


def solve(
    setting: str,
    settings: EstimateSettings,
    gpu: Gpu,
    predict: Predict,
    *,
    most: int | None,
    tries_most_first: bool = False,
) -> Solution:
    """Return the largest value of `setting` with which the run fits on `gpu`, whole error band included.

    Lengths are tried in multiples of 64, ranks in multiples of 8 (and 1, 2, 4). All other settings stay the same,
    including gradient accumulation. `most`, the model's number of positions if known, bounds lengths.
    `tries_most_first`: the largest value is likely to fit, and takes little longer to predict than others.

    Raises:
        UsageError: `setting` can't be solved for.
        QloraError: the settings can't be combined, with any value or with one that was tried.
    """
    _check_known(setting)
    values, bound = _values(setting, most)
    process_bytes: dict[int, int] = {}

    def headroom_at(position: int) -> int:
        estimate = predict(with_value(settings, setting, values[position]), gpu)
        process_bytes[position] = estimate.predicted.process_bytes
        return headroom_bytes(estimate, gpu)

    start = max(bisect_right(values, _value(settings, setting)) - 1, 0)
    best = _search_upwards(start, len(values) - 1, headroom_at, tries_top_first=tries_most_first)
    return Solution(
        setting=setting,
        gpu=gpu.name,
        value=None if best is None else values[best],
        process_bytes=None if best is None else process_bytes[best],
        limited_by=bound if best == len(values) - 1 else "memory",
    )


def sweep(
    values: Mapping[str, tuple[int, ...]], settings: EstimateSettings, gpu: Gpu, predict: Predict
) -> tuple[SweepPoint, ...]:
    """Return the memory and time of the run with every combination of `values`, the last setting changing fastest.

    Raises:
        UsageError: a setting can't be swept, or does not take one of its values.
        QloraError: the settings can't be combined with one of the values.
    """
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    changed = []
    for combination in combinations:  # all are checked before the first prediction, which takes a second
        variant = settings
        for setting, value in combination.items():
            variant = with_value(variant, setting, value)
        changed.append(variant)
    return tuple(_point(point, predict(variant, gpu)) for point, variant in zip(combinations, changed, strict=True))


def _point(values: dict[str, int], estimate: Estimate) -> SweepPoint:
    figures = figures_of_run(estimate)
    return SweepPoint(
        values=values,
        gradient_checkpointing=estimate.gradient_checkpointing,
        allocated_bytes=figures.allocated_bytes,
        reserved_bytes=figures.reserved_bytes,
        process_bytes=figures.process_bytes,
        ruling_phase=estimate.ruling_phase,
        step_seconds=figures.step_seconds,
        step_seconds_low=figures.step_seconds_low,
        step_seconds_high=figures.step_seconds_high,
        tokens_per_second=figures.tokens_per_second,
        tokens_per_second_low=figures.tokens_per_second_low,
        tokens_per_second_high=figures.tokens_per_second_high,
        limited_by=figures.limited_by,
    )


def with_value(settings: EstimateSettings, setting: str, value: int) -> EstimateSettings:
    """Return the settings with another value of `setting`, the name of its flag without dashes.

    Raises:
        UsageError: no such setting can be varied, or it does not take the value.
    """
    _check_known(setting)
    section, key = SETTINGS[setting].split(".")
    kind: type[Section] = type(getattr(settings, section))
    try:
        value_adapter(kind, key).validate_python(value)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise UsageError(f"{setting} {expected}, got {value}", hint=kind.model_fields[key].description) from None
    return with_settings(settings, {SETTINGS[setting]: value})


def search_between(
    low: Point, high: Point, headroom_at: Callable[[int], float], *, max_predictions: int | None = None
) -> int:
    """Return the largest position that fits, between `low`, which fits, and `high`, which does not.

    Memory grows nearly linearly, so the search interpolates: false position, with the weight of an end halved when it
    stays twice (the Illinois method: Dowell and Jarratt, 1971), which curvature does not slow down. After
    `NUM_INTERPOLATED` predictions it bisects. With `max_predictions` it returns the largest position that was tried.
    """
    assert low.headroom >= 0 > high.headroom, (low, high)
    num_predictions = side = 0
    while high.at - low.at > 1 and num_predictions != max_predictions:
        share = low.headroom / (low.headroom - high.headroom) if num_predictions < NUM_INTERPOLATED else 0.5
        at = min(max(low.at + int((high.at - low.at) * share), low.at + 1), high.at - 1)
        tried = Point(at, headroom_at(at))
        num_predictions += 1
        if tried.headroom >= 0:
            low, high = tried, replace(high, headroom=high.headroom / 2) if side > 0 else high
            side = 1
        else:
            low, high = replace(low, headroom=low.headroom / 2) if side < 0 else low, tried
            side = -1
    return low.at


def _search_upwards(start: int, top: int, headroom_at: Callable[[int], float], *, tries_top_first: bool) -> int | None:
    """Return the largest position up to `top` that fits, searching from `start`; None if none does."""
    low = before = Point(start, headroom_at(start))
    if low.headroom < 0:
        least = Point(0, headroom_at(0)) if start else low
        return search_between(least, low, headroom_at) if least.headroom >= 0 else None
    while low.at < top:
        at = top if tries_top_first else min(_next_position(before, low), top)
        tried = Point(at, headroom_at(at))
        if tried.headroom < 0:
            return search_between(low, tried, headroom_at)
        before, low = low, tried
    return top


def _next_position(before: Point, low: Point) -> int:
    """Return the position to try next above `low`: just beyond where the line through both points reaches zero."""
    if before.headroom <= low.headroom:  # only one point, or no growth yet: double the value
        return 2 * low.at + 1
    num_steps = ceil(low.headroom * (low.at - before.at) / (before.headroom - low.headroom))
    return min(low.at + num_steps + 1, MAX_GROWTH * (low.at + 1))


def _check_known(setting: str) -> None:
    if setting not in SETTINGS:
        raise UsageError(f"{setting!r} can't be varied here", hint=f"Vary one of {', '.join(SETTINGS)}.")


def _value(settings: EstimateSettings, setting: str) -> int:
    section, key = SETTINGS[setting].split(".")
    value = getattr(getattr(settings, section), key)
    assert isinstance(value, int)
    return value


def _values(setting: str, most: int | None) -> tuple[Sequence[int], str]:
    """Return the values of `setting` to try, smallest first, and the reason for the largest."""
    if setting == "micro-batch-size":
        return range(1, MAX_ROWS + 1), f"{MAX_ROWS:,} rows, the most that are tried"
    if setting == "rank":
        return (1, 2, 4, *range(8, MAX_RANK + 1, 8)), "the largest rank that is allowed"
    if most is None:
        return range(LENGTH_STEP, MAX_TOKENS + 1, LENGTH_STEP), f"{MAX_TOKENS:,} tokens, the most that are tried"
    return (*range(LENGTH_STEP, most, LENGTH_STEP), most), "the positions of the model"
