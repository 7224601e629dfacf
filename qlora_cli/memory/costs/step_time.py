"""The predicted time of an optimizer step, from its traced operations and the rates of a GPU.

Imports no torch.
"""

from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import StepTime
from qlora_cli.timing.operation import Counted
from qlora_cli.timing.rates_file import KnownRates, known_rates
from qlora_cli.timing.roofline import cost_of

# The ends of the error band, as shares of the predicted seconds. They are the spread of the published rows that
# `benchmarks/published_speed.py` compares with: 26 of 30 lie within, most of those outside for a known reason.
LOW, HIGH = 0.75, 1.30
# Those with rates that were measured, whose error is no longer in it. Steps on a CPU were within (decision 38); a GPU
# was not tried.
MEASURED_LOW, MEASURED_HIGH = 0.80, 1.25


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
    known = rates_on(gpu)
    if known is None:
        return None
    rates = known.rates
    low, high = (MEASURED_LOW, MEASURED_HIGH) if known.measured_on else (LOW, HIGH)
    of_micro_batch = cost_of(micro_batch, rates, host_bytes=2 * pinned_host_bytes)
    of_update = cost_of(update, rates)
    seconds = num_micro_batches * of_micro_batch.seconds + of_update.seconds
    tokens_per_second = num_micro_batches * num_tokens / seconds
    return StepTime(
        micro_batch_seconds=of_micro_batch.seconds,
        update_seconds=of_update.seconds,
        step_seconds=seconds,
        step_seconds_low=seconds * low,
        step_seconds_high=seconds * high,
        tokens_per_second=tokens_per_second,
        tokens_per_second_low=tokens_per_second / high,
        tokens_per_second_high=tokens_per_second / low,
        limited_by=of_micro_batch.limited_by,
        device_seconds=num_micro_batches * of_micro_batch.device_seconds + of_update.device_seconds,
        host_seconds=num_micro_batches * of_micro_batch.host_seconds + of_update.host_seconds,
        rates=known.source,
    )


def rates_on(gpu: Gpu) -> KnownRates | None:
    """Return what `gpu` sustains: measured on this machine, else by its data sheet; None if neither is known."""
    return known_rates(gpu.measured_as, card=gpu.card, num_sms=gpu.num_sms)
