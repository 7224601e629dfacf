"""The predicted time of a whole run: the sum over its micro-batches, of which only a few are predicted.

Imports no torch.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import RunFigures, StepTime
from qlora_cli.memory.request import Predict
from qlora_cli.memory.run_batches import RunBatches, with_tokens
from qlora_cli.settings.models import EstimateSettings

HOUR_SECONDS = 3600
MAX_PREDICTED = 6  # sizes of a micro-batch, each of which takes about a second; the others lie in between


def with_run(
    figures: RunFigures,
    settings: EstimateSettings,
    batches: RunBatches | None,
    gpu: Gpu,
    predict: Predict,
    *,
    price: float | None = None,
) -> RunFigures:
    """Return `figures` with those of a run with these micro-batches; unchanged without any, or if no step is timed.

    `price` is that of an hour of a GPU, in any currency. Cost and energy are those of all GPUs.
    """
    known = rates_on(gpu)
    if batches is None or known is None or figures.step_seconds is None:
        return figures

    def time_of(tokens: int) -> StepTime:
        time = predict(with_tokens(settings, tokens), gpu).time
        assert time is not None, f"{gpu.name} has rates"
        return time

    total = _total(batches, time_of)
    num_gpus = settings.training.num_gpus
    per_second = None if price is None else num_gpus * price / HOUR_SECONDS
    wh_per_second = num_gpus * known.rates.watts / HOUR_SECONDS or None
    return replace(
        figures,
        num_steps=batches.num_steps,
        run_seconds=total.seconds,
        run_seconds_low=total.low,
        run_seconds_high=total.high,
        run_limited_by=total.limited_by,
        cost=per_second and per_second * total.seconds,
        cost_low=per_second and per_second * total.low,
        cost_high=per_second and per_second * total.high,
        energy_wh=wh_per_second and wh_per_second * total.seconds,
        energy_wh_low=wh_per_second and wh_per_second * total.low,
        energy_wh_high=wh_per_second and wh_per_second * total.high,
    )


@dataclass(frozen=True, kw_only=True)
class _Total:
    """The seconds of a run with the ends of their band, and what limits most of its micro-batches."""

    seconds: float
    low: float
    high: float
    limited_by: str


def _total(batches: RunBatches, time_of: Callable[[int], StepTime]) -> _Total:
    sizes = predicted_sizes([tokens for tokens, _ in batches.by_tokens])
    times = [time_of(tokens) for tokens in sizes]
    known = [(tokens, time.micro_batch_seconds) for tokens, time in zip(sizes, times, strict=True)]
    update = times[-1].update_seconds
    seconds, limits = batches.num_steps * update, dict.fromkeys((time.limited_by for time in times), 0.0)
    for tokens, number in batches.by_tokens:
        own = number * interpolated(known, tokens)
        seconds += own
        nearest = min(range(len(sizes)), key=lambda at: abs(sizes[at] - tokens))
        limits[times[nearest].limited_by] += own
    longest = times[-1]
    return _Total(
        seconds=seconds,
        low=seconds * longest.step_seconds_low / longest.step_seconds,
        high=seconds * longest.step_seconds_high / longest.step_seconds,
        limited_by=max(limits, key=lambda name: limits[name]),
    )


def predicted_sizes(tokens: Sequence[int]) -> list[int]:
    """Return the sizes to predict of micro-batches of so many `tokens`, rising: all of a few, else in equal ratios."""
    sizes = sorted(set(tokens))
    if len(sizes) <= MAX_PREDICTED:
        return sizes
    ratio = (sizes[-1] / sizes[0]) ** (1 / (MAX_PREDICTED - 1))
    between = [round(sizes[0] * ratio**power) for power in range(1, MAX_PREDICTED - 1)]
    return sorted({sizes[0], *between, sizes[-1]})


def interpolated(known: Sequence[tuple[int, float]], tokens: int) -> float:
    """Return the seconds of a micro-batch of `tokens`, from those of some sizes, which rise and enclose it.

    Time has a constant, a linear (products) and a quadratic part (attention), so it is the parabola through the three
    sizes nearest to it (Lagrange); of two, the line.
    """
    at = bisect_left([size for size, _ in known], tokens)
    if known[at][0] == tokens:
        return known[at][1]
    start = max(0, min(at - 1, len(known) - 3))
    window = known[start : start + 3]
    total = 0.0
    for size, seconds in window:
        for other, _ in window:
            seconds *= (tokens - other) / (size - other) if other != size else 1
        total += seconds
    return total
