"""Turn replayed peaks into the estimate for a GPU: with CUDA context, error bands, components and a reason."""

from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.host_run import figures_on_host
from qlora_cli.memory.prediction import (
    ALLOCATED_ERROR,
    COMPONENTS,
    RESERVED_ERROR,
    Components,
    Estimate,
    Figures,
    StepTime,
)
from qlora_cli.memory.replaying.replay import Peaks
from qlora_cli.units import format_bytes

REASONS = {
    "load": "loading takes more than training: a 16-bit weight next to the quantized ones",
    "forward": "the forward pass takes most",
    "backward": "the backward pass takes most",
    "optimizer": "the optimizer's step takes most: its state and temporaries",
    "evaluation": "evaluation takes most",
}
COMPONENT_NAMES = {
    "quantized_weights": "the quantized weights",
    "quantization_constants": "their constants",
    "unquantized_weights": "the weights in 16 or 32 bit",
    "adapters": "the adapters",
    "gradients": "the gradients",
    "optimizer": "the optimizer",
    "activations": "activations",
    "loss": "logits and loss",
    "gathered": "the weights gathered from other GPUs",
    "workspaces": "weights dequantized inside kernels, and workspaces",
}


def estimate_of(
    peaks: Peaks,
    gpu: Gpu,
    *,
    dtype: str,
    backends: tuple[str, ...],
    checkpointing: str,
    paged_bytes: int,
    pinned_host_bytes: int,
    time: StepTime | None = None,
) -> Estimate:
    """Return the estimate for a run with these peaks on `gpu`."""
    by_label = {name: peaks.by_label.get(name, 0) for name in COMPONENTS}
    held_bytes = peaks.allocated_bytes if gpu.is_host else peaks.reserved_bytes
    by_label["slack"] = held_bytes - sum(by_label.values())
    by_label["context"] = gpu.context_bytes
    return Estimate(
        gpu=gpu.name,
        dtype=dtype,
        attention_backends=backends,
        gradient_checkpointing=checkpointing,
        predicted=figures_on_host(peaks.allocated_bytes, gpu) if gpu.is_host else _figures(peaks, gpu),
        components=Components(**{f"{name}_bytes": size for name, size in by_label.items()}),
        phases=peaks.phases,
        paged_bytes=paged_bytes,
        pinned_host_bytes=pinned_host_bytes,
        ruling_phase=peaks.ruling_phase,
        reason=_reason(peaks),
        time=time,
    )


def _figures(peaks: Peaks, gpu: Gpu) -> Figures:
    allocated, reserved = peaks.allocated_bytes, peaks.reserved_bytes
    reserved_low = max(allocated, round(reserved * (1 - RESERVED_ERROR)))
    reserved_high = round(reserved * (1 + RESERVED_ERROR))
    return Figures(
        allocated_bytes=allocated,
        allocated_low_bytes=round(allocated * (1 - ALLOCATED_ERROR)),
        allocated_high_bytes=round(allocated * (1 + ALLOCATED_ERROR)),
        reserved_bytes=reserved,
        reserved_low_bytes=reserved_low,
        reserved_high_bytes=reserved_high,
        process_bytes=reserved + gpu.context_bytes,
        process_low_bytes=reserved_low + gpu.context_bytes,
        process_high_bytes=reserved_high + max(gpu.context_bytes, gpu.context_high_bytes),
    )


def _reason(peaks: Peaks) -> str:
    """Return a sentence that names the phase with the peak, and its largest components."""
    largest = sorted(COMPONENT_NAMES, key=lambda name: -peaks.by_label.get(name, 0))[:2]
    held = " and ".join(f"{COMPONENT_NAMES[name]} ({format_bytes(peaks.by_label.get(name, 0))})" for name in largest)
    return f"{REASONS[peaks.ruling_phase]}; the largest parts are {held}"
