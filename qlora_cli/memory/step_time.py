"""The predicted time of an optimizer step, from its traced operations and the rates of a GPU, and that of a whole run.

Imports no torch.
"""

from dataclasses import replace
from math import ceil

from qlora_cli.errors import UsageError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import RunFigures, StepTime
from qlora_cli.memory.request import Predict
from qlora_cli.settings.models import EstimateSettings, PredictionSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.timing.operation import Counted
from qlora_cli.timing.rates import rates_of
from qlora_cli.timing.roofline import cost_of

# The ends of the error band, as shares of the predicted seconds. They are the spread of the published rows that
# `benchmarks/published_speed.py` compares with: 26 of 30 lie within, most of those outside for a known reason.
LOW, HIGH = 0.75, 1.30
HOUR_SECONDS = 3600


def step_time(
    micro_batch: Counted,
    update: Counted,
    gpu: Gpu,
    *,
    num_micro_batches: int,
    num_tokens: int,
    pinned_host_bytes: int,
) -> StepTime | None:
    """Return the time of a step on `gpu`; None if its rates are not known.

    `num_tokens` are those of a micro-batch, and `pinned_host_bytes` what it copies to the host and back.
    """
    rates = rates_of(gpu.card, gpu.num_sms)
    if rates is None:
        return None
    of_micro_batch = cost_of(micro_batch, rates, host_bytes=2 * pinned_host_bytes)
    of_update = cost_of(update, rates)
    seconds = num_micro_batches * of_micro_batch.seconds + of_update.seconds
    tokens_per_second = num_micro_batches * num_tokens / seconds
    return StepTime(
        micro_batch_seconds=of_micro_batch.seconds,
        update_seconds=of_update.seconds,
        step_seconds=seconds,
        step_seconds_low=seconds * LOW,
        step_seconds_high=seconds * HIGH,
        tokens_per_second=tokens_per_second,
        tokens_per_second_low=tokens_per_second / HIGH,
        tokens_per_second_high=tokens_per_second / LOW,
        limited_by=of_micro_batch.limited_by,
        device_seconds=num_micro_batches * of_micro_batch.device_seconds + of_update.device_seconds,
        host_seconds=num_micro_batches * of_micro_batch.host_seconds + of_update.host_seconds,
    )


def with_run(
    figures: RunFigures, settings: EstimateSettings, asked: PredictionSettings, gpu: Gpu, predict: Predict
) -> RunFigures:
    """Return `figures` with those of a run over as many rows as `asked`; unchanged if the time is not known.

    Steps are predicted at the mean length of rows, or at full length if rows are packed.

    Raises:
        UsageError: rows are longer on average than the longest may be.
    """
    rates = rates_of(gpu.card, gpu.num_sms)
    if asked.rows is None or rates is None:
        return figures
    length = settings.data.max_length
    mean_tokens = length if asked.mean_tokens is None else asked.mean_tokens
    if mean_tokens > length:
        raise UsageError(
            f"{mean_tokens:,} is more than the {length:,} tokens that a row may have",
            hint="Rows are truncated there: give --max-length as well, or fewer --mean-tokens.",
            setting="inspect_memory.mean_tokens",
        )
    training = settings.training
    rows = asked.rows * training.epochs
    if settings.data.packing:
        rows, mean_tokens = rows * mean_tokens / length, length
    num_steps = training.max_steps or ceil(rows / (training.micro_batch_size * training.gradient_accumulation_steps))
    time = predict(with_settings(settings, {"data.max_length": mean_tokens}), gpu).time
    assert time is not None, f"{gpu.name} has rates"
    hours = num_steps * time.step_seconds / HOUR_SECONDS
    return replace(
        figures,
        num_steps=num_steps,
        run_seconds=num_steps * time.step_seconds,
        run_seconds_low=num_steps * time.step_seconds_low,
        run_seconds_high=num_steps * time.step_seconds_high,
        cost=None if asked.price is None else asked.price * hours,
        energy_wh=rates.watts * hours,
    )
