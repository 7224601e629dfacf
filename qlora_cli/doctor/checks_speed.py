"""Measure what the device of a run sustains, and store it: the predicted time of a step on this machine is by it."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from qlora_cli.doctor.findings import Json, Outcome, ok, warning
from qlora_cli.settings.choices import Dtype
from qlora_cli.timing.rates import Rates, rates_of
from qlora_cli.units import format_rate

if TYPE_CHECKING:
    import torch

    from qlora_cli.memory.gpus import Gpu

SECONDS = 10.0
BUSY_SHARE = 0.85  # of the time in which the measuring thread has a core, below which something else runs
RATES = (
    *("flops", "fp32_flops", "attention_flops", "num_bytes", "dequantized_bytes", "narrow_bytes"),
    *("host_copy_bytes", "dispatch_seconds"),
)  # those that are measured
FREE_DISK = "Free disk space, or set QLORA_CACHE to a directory that can be written, and measure again."


def check_speed(device_name: str) -> Outcome:
    """Measure a device in about ten seconds, with the compute dtype that a run would use there."""
    import torch

    from qlora_cli.hardware.device import choose_compute_dtype
    from qlora_cli.timing.measuring import measure_rates
    from qlora_cli.timing.rates_file import store_rates

    device = torch.device(device_name)
    compute, card = choose_compute_dtype(Dtype.AUTO, device), _device_of(device)
    start, own_start = time.monotonic(), time.thread_time()
    rates = measure_rates(device, compute.torch_dtype, seconds=SECONDS)
    core_share = (time.thread_time() - own_start) / max(time.monotonic() - start, 1e-9)
    of_card = rates_of(card.card, card.num_sms)
    finding = f"{card.name}: {format_rate(rates.flops, 'FLOP')} in {compute.name}, {format_rate(rates.num_bytes, 'B')}"
    details: dict[str, Json] = {
        "device": device_name,
        "name": card.name,
        "compute_dtype": compute.name,
        "measured": _measured_part(rates),
        "data_sheet": None if of_card is None else _measured_part(of_card),
    }
    try:
        store_rates(card.measured_as, compute.name, rates)
    except OSError as error:
        return warning(f"{finding}, which can't be stored: {error}", FREE_DISK, **details)
    # Rates are not slowed down by other programs, but a run would be.
    busy = f"; other programs had the core for {1 - core_share:.0%} of the time" if core_share < BUSY_SHARE else ""
    return ok(f"{finding}; predicted times are by these rates from now on{busy if rates.is_host else ''}", **details)


def _measured_part(rates: Rates) -> Mapping[str, float]:
    values = asdict(rates)
    return {name: values[name] for name in RATES}


def _device_of(device: "torch.device") -> "Gpu":
    import torch

    from qlora_cli.memory.gpus import find_gpu, this_cpu

    if device.type == "cpu":
        return this_cpu()
    with torch.cuda.device(device):
        return find_gpu("auto")
