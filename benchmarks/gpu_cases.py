"""The cases of the GPU suite, as data; to add one, add a row."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the suite: a model size, the settings that differ from the defaults, and how long to run.

    Settings go by their full names. All others have their defaults, except that a step is one row of 1024 tokens. A
    case without steps measures loading only, one without a size measures kernels.

    Attributes:
        is_timed: Its seconds count, so that nothing else runs on the GPU; others run several at a time.
        is_profiled: One more step is profiled after the measured ones.
        timeout_seconds: When the case is ended; what it measured until then is recorded.
        needs: A package without which the case is left out.
    """

    name: str
    size: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 6
    num_warmup_steps: int = 2
    is_timed: bool = False
    is_profiled: bool = False
    timeout_seconds: float = 75
    needs: str | None = None


KERNELS = Case(name="kernels", size=None, num_steps=0, num_warmup_steps=0, is_timed=True)


# Planned for the GPU, it would be off on one that is large.
CHECKPOINTED = {"training.gradient_checkpointing": "on"}


def _values(settings: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in settings.items()}


def _load(size: str, what: str, **settings: Any) -> Case:
    return Case(name=f"{size}-load-{what}", size=size, settings=_values(settings), num_steps=0, num_warmup_steps=0)


def _loads(size: str, *methods: str) -> tuple[Case, ...]:
    return tuple(_load(size, method, quantization__method=method) for method in methods)


def _memory(size: str, what: str, needs: str | None = None, **settings: Any) -> Case:
    """Return a case that compares the predicted with the measured memory, for which a few steps are enough."""
    return Case(
        name=f"{size}-memory-{what}",
        size=size,
        settings=CHECKPOINTED | _values(settings),
        num_steps=3,
        num_warmup_steps=1,
        needs=needs,
    )


def _step(size: str, what: str, *, is_profiled: bool = False, timeout_seconds: float = 75, **settings: Any) -> Case:
    """Return a case that measures the seconds of a step."""
    return Case(
        name=f"{size}-step-{what}",
        size=size,
        settings=CHECKPOINTED | _values(settings),
        is_timed=True,
        is_profiled=is_profiled,
        timeout_seconds=timeout_seconds,
    )


# Two micro-batches of four packed rows: what public tables of throughput are measured with.
PUBLIC: dict[str, Any] = {
    "data__packing": True,
    "data__max_length": 2048,
    "training__micro_batch_size": 2,
    "training__gradient_accumulation_steps": 4,
}
# Sixteen rows as short as most data sets have, which a plan joins.
SHORT_ROWS: dict[str, Any] = {"data__max_length": 256, "training__gradient_accumulation_steps": 16}
FLASH = {"model__attention": "flash_attention_2", "needs": "flash_attn"}

# Every trained case compares predicted with measured memory. The first that are not timed differ most from what
# public measurements cover: bf16, double quantization, fused kernels, the own loss, long rows.
FIRST_MEMORY_CASES = (
    _memory("1b", "512-tokens", data__max_length=512),
    _memory("1b", "8192-tokens", data__max_length=8192),
    _memory("1b", "padded", training__micro_batch_size=4, data__max_length=2048),
    _memory("1b", "packed", data__packing=True, data__max_length=4096),
    _memory("1b", "no-checkpointing", training__gradient_checkpointing="off", data__max_length=2048),
    _memory("1b", "selective", training__gradient_checkpointing="selective", data__max_length=2048),
    _memory("1b", "offload", training__gradient_checkpointing="offload", data__max_length=8192),
    _memory("1b", "paged-8-bit-adam", training__optimizer="paged_adamw_8bit", lora__rank=64),
    _memory("2b-moe", "experts", data__max_length=2048),
    _memory("8b", "8192-tokens", data__max_length=8192),
)
MORE_MEMORY_CASES = (
    _memory("1b", "4096-tokens", data__max_length=4096),
    _memory("1b", "accumulation", training__gradient_accumulation_steps=4, data__max_length=2048),
    _memory("1b", "int8", quantization__method="int8"),
    _memory("1b", "16-bit", quantization__method="none", data__max_length=2048),
    _memory("1b", "eager", model__attention="eager", data__max_length=2048),
    _memory("1b", "8-bit-adam", training__optimizer="adamw_8bit", lora__rank=64),
    _memory("8b", "rank-64", lora__rank=64, data__max_length=2048),
    _memory("8b", "selective-8192", training__gradient_checkpointing="selective", data__max_length=8192),
    _memory("1b", "packed-flash", data__packing=True, data__max_length=4096, **FLASH),
    _memory("1b", "flash-attention-2", data__max_length=4096, **FLASH),
    _memory("1b", "single-quantization", quantization__double_quant=False),
    _memory("1b", "fp32", model__dtype="fp32"),
    _memory("1b", "fused-adam", training__optimizer="adamw_torch_fused", lora__rank=64),
    _memory("1b", "16384-tokens", data__max_length=16_384),
    _memory("1b", "32768-tokens", data__max_length=32_768),
    _memory("70b-wide", "2048-tokens", data__max_length=2048),
)
# The seconds of a step with each part of it on and off. The first is what the others are compared with.
FIRST_STEP_CASES = (
    _step("8b", "2048", data__max_length=2048, is_profiled=True),
    _step("8b", "2048-peft-layers", data__max_length=2048, training__fused_lora=False),
    _step("8b", "2048-selective", data__max_length=2048, training__gradient_checkpointing="selective"),
    _step(
        "8b", "2048-no-checkpointing", data__max_length=2048, training__gradient_checkpointing="off", is_profiled=True
    ),
)
MORE_STEP_CASES = (
    _step("8b", "short-rows", **SHORT_ROWS),
    _step("8b", "short-rows-filled", **SHORT_ROWS, training__micro_batch_tokens=2048),
    _step("1b", "short-rows", **SHORT_ROWS),
    _step("1b", "short-rows-filled", **SHORT_ROWS, training__micro_batch_tokens=2048),
    _step("8b", "public", **PUBLIC),
    _step("8b", "public-planned", **PUBLIC, training__gradient_checkpointing="auto"),
    _step("8b", "public-no-checkpointing", **PUBLIC, training__gradient_checkpointing="off"),
    _step("8b", "2048-compiled", data__max_length=2048, training__torch_compile=True, timeout_seconds=120),
    _step("8b", "2048-offload", data__max_length=2048, training__gradient_checkpointing="offload"),
    _step("1b", "2048", data__max_length=2048, is_profiled=True),
    _step("1b", "2048-compiled", data__max_length=2048, training__torch_compile=True, timeout_seconds=120),
    _step("2b-moe", "2048", data__max_length=2048, is_profiled=True),
    _step("8b", "2048-16-bit", data__max_length=2048, quantization__method="none"),
    _step(
        "8b", "2048-16-bit-peft-layers", data__max_length=2048, quantization__method="none", training__fused_lora=False
    ),
    _step("8b", "2048-int8", data__max_length=2048, quantization__method="int8"),
    _step("8b", "2048-paged-8-bit-adam", data__max_length=2048, training__optimizer="paged_adamw_8bit"),
)
# Mixtures of experts: int8 can't store them.
LOAD_CASES = (
    *_loads("1b", "nf4", "fp4", "int8", "none"),
    *_loads("2b-moe", "nf4", "fp4", "none"),
    *_loads("8b", "nf4", "fp4", "int8", "none"),
    _load("8b", "nf4-offload-embedding", model__offload_embedding=True),
)

# By worth: what a time limit leaves out is the end.
CASES = (
    KERNELS,
    *FIRST_STEP_CASES,
    *FIRST_MEMORY_CASES,
    *MORE_STEP_CASES,
    *MORE_MEMORY_CASES,
    *LOAD_CASES,
)

# What a CPU refuses, or a model of two layers has no use for, and what takes its place there.
REHEARSED_SIZES = {None: None, "2b-moe": "tiny-moe"}
REHEARSED_VALUES: dict[str, dict[Any, Any]] = {
    "training.optimizer": {"paged_adamw_8bit": "adamw_torch", "adamw_8bit": "adamw_torch"},
    "training.gradient_checkpointing": {"offload": "on"},
    "training.torch_compile": {True: False},
    "model.offload_embedding": {True: False},
    "model.attention": {"flash_attention_2": "sdpa"},
}
REHEARSED_LENGTH = 64


def rehearsed(case: Case) -> Case:
    """Return the case as a CPU without a GPU's kernels can run it in seconds: the same path, on a tiny model."""
    settings = {name: REHEARSED_VALUES.get(name, {}).get(value, value) for name, value in case.settings.items()}
    if case.num_steps:
        settings["data.max_length"] = REHEARSED_LENGTH
    return replace(
        case,
        size=REHEARSED_SIZES.get(case.size, "tiny"),
        settings=settings,
        num_steps=min(case.num_steps, 3),
        needs=None,
    )
