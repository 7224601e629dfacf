"""The predicted time of an optimizer step, from its traced operations and the rates of a GPU.

Imports no torch.
"""

from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import StepTime
from qlora_cli.settings.choices import Checkpointing, Dtype
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.sections.inspect_memory import Link
from qlora_cli.timing.links import exchange_seconds, gather_seconds
from qlora_cli.timing.operation import Counted
from qlora_cli.timing.rates_file import KnownRates, known_rates
from qlora_cli.timing.roofline import HOST, Cost, cost_of
from qlora_cli.timing.run_ratios import Correction, RunKey

DEVICE, LINK = "device", "link"

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
    gradient_bytes: int = 0,
    received_bytes: int = 0,
    copied_bytes: int = 0,
    num_processes: int = 1,
    link: Link = Link.PCIE,
    kind: str = "",
) -> StepTime | None:
    """Return the time of a step on `gpu`; None if its rates are not known.

    `num_tokens` are those of a micro-batch, and `pinned_host_bytes` what it copies to the host and back. Each of
    several processes has so many micro-batches, and sums its gradients with the others', as part of the update. While
    it computes one, it copies `copied_bytes` of weights for the next layers from the host, and receives
    `received_bytes` of them; the step takes as long as the computation or both, whichever is longer.
    Earlier runs of the same `kind` on this machine correct the time.
    """
    known = rates_on(gpu)
    if known is None:
        return None
    corrections = _Corrections(known, gpu.measured_as, kind)
    of_micro_batch = corrections.applied(cost_of(micro_batch, known.rates, host_bytes=2 * pinned_host_bytes))
    of_update = corrections.applied(cost_of(update, known.rates))
    correction = corrections.of_limit(of_micro_batch)
    low, high = _band(known, correction)
    update_seconds = of_update.seconds + exchange_seconds(gradient_bytes, num_processes, link)
    of_link = gather_seconds(received_bytes, link) + copied_bytes / known.rates.host_copy_bytes
    micro_batch_seconds = max(of_micro_batch.seconds, of_link)
    seconds = num_micro_batches * micro_batch_seconds + update_seconds
    tokens_per_second = num_processes * num_micro_batches * num_tokens / seconds
    return StepTime(
        micro_batch_seconds=micro_batch_seconds,
        update_seconds=update_seconds,
        step_seconds=seconds,
        step_seconds_low=seconds * low,
        step_seconds_high=seconds * high,
        tokens_per_second=tokens_per_second,
        tokens_per_second_low=tokens_per_second / high,
        tokens_per_second_high=tokens_per_second / low,
        limited_by=LINK if of_link > of_micro_batch.seconds else of_micro_batch.limited_by,
        device_seconds=num_micro_batches * of_micro_batch.device_seconds + of_update.device_seconds,
        host_seconds=num_micro_batches * of_micro_batch.host_seconds + of_update.host_seconds,
        rates=known.source,
        learnt_ratio=None if correction is None else correction.ratio,
        learnt_runs=0 if correction is None else correction.num_runs,
        key=corrections.key_of(of_micro_batch),
    )


def kind_of_step(settings: EstimateSettings, dtype: Dtype) -> str:
    """Return in words how layers are computed: a run corrects the predicted time of others that compute them so."""
    training, method = settings.training, settings.quantization.method
    parts = {
        "fused adapters": training.fused_lora,
        f"pairs by {training.objective.value}": training.objective.has_pairs,
        f"labels by {training.objective.value}": training.objective.has_labels,
        "compiled": training.torch_compile,
        "several processes": training.num_gpus > 1,
        "Liger kernels": training.use_liger_kernel,
        "offloaded activations": training.gradient_checkpointing == Checkpointing.OFFLOAD,
    }
    return ", ".join([method.value, dtype.value, *(name for name, is_so in parts.items() if is_so)])


class _Corrections:
    """What earlier runs of a kind correct: the time of the device, and that of the host which starts its kernels.

    A step is limited by one of them, and corrects that one.
    """

    def __init__(self, known: KnownRates, device: str, kind: str) -> None:
        self._keys = {limit: known.key_of(device, kind, limit) for limit in (DEVICE, HOST)}
        self._corrections = {limit: known.correction(key) for limit, key in self._keys.items()}

    def applied(self, cost: Cost) -> Cost:
        """Return a cost, corrected."""
        device, host = (1.0 if each is None else each.ratio for each in self._corrections.values())
        return cost.scaled(device, device if cost.is_host else host)

    def of_limit(self, corrected: Cost) -> Correction | None:
        """Return the correction that decides the time."""
        return self._corrections[_limit_of(corrected)]

    def key_of(self, corrected: Cost) -> RunKey:
        """Return the key of what the time is to be compared with."""
        return self._keys[_limit_of(corrected)]


def _limit_of(cost: Cost) -> str:
    return HOST if cost.waits_for_host else DEVICE


def _band(known: KnownRates, correction: Correction | None) -> tuple[float, float]:
    """Return the ends of the error band, as shares of the predicted seconds."""
    if correction is not None:
        return correction.low, correction.high
    return (MEASURED_LOW, MEASURED_HIGH) if known.measured_on else (LOW, HIGH)


def rates_on(gpu: Gpu) -> KnownRates | None:
    """Return what `gpu` sustains: measured on this machine, else by its data sheet; None if neither is known."""
    return known_rates(gpu.measured_as, card=gpu.card, num_sms=gpu.num_sms)
