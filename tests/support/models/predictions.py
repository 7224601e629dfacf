"""A made-up prediction, for tests of what displays one, and real ones for the cards that are named alone."""

import pytest

from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.prediction import (
    CardClass,
    Components,
    GpuFit,
    HostMemory,
    MemoryReport,
    Phase,
    RunFigures,
    Solution,
    Suggestion,
    SweepPoint,
)
from qlora_cli.units import GIB, MIB

CONTEXT = 460 * MIB
RESERVED = round(7.9 * GIB)
T4, RTX_4090 = find_gpu("T4"), find_gpu("RTX 4090")


def leave_out_catalogue(patch: pytest.MonkeyPatch) -> None:
    """Leave out on which cards of the catalogue a run fits: the smallest take traces of another kind."""
    patch.setattr("qlora_cli.memory.memory_report.smallest_gpu", lambda *_: None)
    patch.setattr("qlora_cli.memory.memory_report.smallest_classes", lambda *_: (None, None))


def fit(gpu: Gpu, process_bytes: int, high_bytes: int) -> GpuFit:
    """Return the verdict for a GPU."""
    return GpuFit(
        gpu=gpu.name,
        group=gpu.group,
        fits="yes" if high_bytes <= gpu.usable_bytes else "no",
        usable_bytes=gpu.usable_bytes,
        process_bytes=process_bytes,
        process_high_bytes=high_bytes,
        margin_bytes=gpu.usable_bytes - process_bytes,
        gradient_checkpointing="on",
    )


def sweep_point(**values: int) -> SweepPoint:
    """Return a point whose memory grows with the product of its values, `max_length` for `max-length`."""
    product = 1
    for value in values.values():
        product *= value
    reserved = round(5.2 * GIB + product * 1.3 * MIB)
    return SweepPoint(
        values={name.replace("_", "-"): value for name, value in values.items()},
        gradient_checkpointing="on",
        allocated_bytes=round(0.95 * reserved),
        reserved_bytes=reserved,
        process_bytes=reserved + CONTEXT,
        ruling_phase="backward",
        step_seconds=0.25 + product / 1000,
        step_seconds_low=0.2 + product / 1250,
        step_seconds_high=0.3 + product / 800,
        tokens_per_second=product / (0.25 + product / 1000),
        tokens_per_second_low=product / (0.3 + product / 800),
        tokens_per_second_high=product / (0.2 + product / 1250),
        limited_by="compute",
    )


def grid() -> tuple[SweepPoint, ...]:
    """Return the points of `--sweep max-length=512..32768 micro-batch-size=1..8`."""
    return tuple(
        sweep_point(max_length=512 * 2**length, micro_batch_size=2**rows) for length in range(7) for rows in range(4)
    )


FIGURES = RunFigures(
    allocated_bytes=round(7.5 * GIB),
    allocated_low_bytes=round(7.425 * GIB),
    allocated_high_bytes=round(7.575 * GIB),
    reserved_bytes=RESERVED,
    reserved_low_bytes=round(0.94 * RESERVED),
    reserved_high_bytes=round(1.06 * RESERVED),
    process_bytes=RESERVED + CONTEXT,
    process_low_bytes=round(0.94 * RESERVED) + CONTEXT,
    process_high_bytes=round(1.06 * RESERVED) + CONTEXT + 120 * MIB,
    step_seconds=11.413,
    step_seconds_low=8.56,
    step_seconds_high=14.837,
    tokens_per_second=2870.4,
    tokens_per_second_low=2208.0,
    tokens_per_second_high=3827.2,
    limited_by="compute",
    rates="data sheet",
)
COMPONENTS = Components(
    quantized_weights_bytes=3 * GIB + 7 * MIB,
    quantization_constants_bytes=108 * MIB,
    unquantized_weights_bytes=2 * GIB + 5 * MIB,
    adapters_bytes=160 * MIB,
    gradients_bytes=160 * MIB,
    optimizer_bytes=320 * MIB,
    activations_bytes=700 * MIB,
    loss_bytes=490 * MIB,
    workspaces_bytes=0,
    gathered_bytes=0,
    slack_bytes=RESERVED - 5 * GIB - 1950 * MIB,
    context_bytes=CONTEXT,
)
REPORT = MemoryReport(
    model="llama-3.1-8b",
    architecture="LlamaForCausalLM",
    num_parameters=8_030_261_248,
    num_trainable_parameters=41_943_040,
    settings={
        "quant": "nf4",
        "double-quant": "true",
        "rank": "16",
        "target-modules": "all-linear",
        "max-length": "2048",
        "micro-batch-size": "1",
        "gradient-accumulation-steps": "16",
        "gradient-checkpointing": "on",
        "optimizer": "adamw_torch",
    },
    data=None,
    gpu="RTX 4090",
    dtype="bf16",
    attention_backends=("flash",),
    predicted=FIGURES,
    components=COMPONENTS,
    phases=(
        Phase(name="load", allocated_bytes=round(5.6 * GIB), reserved_bytes=round(5.8 * GIB)),
        Phase(name="forward", allocated_bytes=round(7.1 * GIB), reserved_bytes=round(7.4 * GIB)),
        Phase(name="backward", allocated_bytes=round(7.5 * GIB), reserved_bytes=RESERVED),
        Phase(name="optimizer", allocated_bytes=round(6.2 * GIB), reserved_bytes=RESERVED),
    ),
    ruling_phase="backward",
    reason="The backward pass rules: the loss's logits of 2,048 tokens over 128,256 words are held twice in 32 bit "
    "while the last layer is recomputed.",
    paged_bytes=0,
    pinned_host_bytes=0,
    host=HostMemory(
        process_bytes=2 * GIB,
        embedding_bytes=0,
        rows_bytes=0,
        reading_bytes=1002 * MIB,
        pinned_bytes=0,
        saving_bytes=480 * MIB,
        paged_bytes=0,
    ),
    sharding=None,
    plan=None,
    methods=None,
    unquantized=None,
    fits=(fit(RTX_4090, FIGURES.process_bytes, FIGURES.process_high_bytes),),
    smallest_gpu="RTX 3080 10GB",
    smallest_class=CardClass(
        size_gb=10,
        gpus=("RTX 3080 10GB",),
        usable_bytes=9872 * MIB,
        process_bytes=FIGURES.process_bytes,
        process_high_bytes=FIGURES.process_high_bytes,
    ),
    roomy_class=CardClass(
        size_gb=12,
        gpus=("RTX 3060 12GB", "RTX 4070", "RTX 5070", "RTX 4070 Super"),
        usable_bytes=11776 * MIB,
        process_bytes=FIGURES.process_bytes,
        process_high_bytes=FIGURES.process_high_bytes,
    ),
    suggestions=(),
    longer_rows=None,
    larger_model=None,
    fitting_model=None,
    solutions=(),
    cards=None,
    sweep=(),
    assumptions=(
        "Every row is 2,048 tokens long, the longest that is allowed; shorter ones take less.",
        "Nothing else runs on the GPU: a desktop takes 0.3 to 1 GiB.",
    ),
    estimate_seconds=2.31,
)
CATALOGUE_FITS = tuple(fit(gpu, FIGURES.process_bytes, FIGURES.process_high_bytes) for gpu in GPUS)
SUGGESTIONS = (
    Suggestion(
        flags="--micro-batch-size 1 --gradient-accumulation-steps 32",
        effect="the same batch in more passes, a little slower",
        saved_bytes=round(2.5 * GIB),
        process_bytes=round(15.2 * GIB),
        fits="no",
    ),
    Suggestion(
        flags="--gradient-checkpointing on",
        effect="about half as much computation again",
        saved_bytes=round(4.2 * GIB),
        process_bytes=round(13.5 * GIB),
        fits="tight",
    ),
)
SOLUTIONS = (
    Solution(
        setting="max-length",
        gpu="RTX 4090",
        value=13952,
        process_bytes=round(22.9 * GIB),
        limited_by="memory",
    ),
    Solution(setting="rank", gpu="T4", value=None, process_bytes=None, limited_by="memory"),
)
