"""The cases of the GPU suite, as data; to add one, add a row."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the suite: a model size, the settings that differ from the defaults, and how long to run.

    Settings go by their full names. All others have their defaults, except that a step is one row of 1024 tokens. A
    case without steps measures loading only.
    """

    name: str
    size: str
    settings: dict[str, Any]
    num_steps: int = 6
    num_warmup_steps: int = 2


def _load(size: str, what: str, **settings: Any) -> Case:
    values = {name.replace("__", "."): value for name, value in settings.items()}
    return Case(name=f"{size}-load-{what}", size=size, settings=values, num_steps=0, num_warmup_steps=0)


def _loads(size: str, *methods: str) -> tuple[Case, ...]:
    return tuple(_load(size, method, quantization__method=method) for method in methods)


def _memory(size: str, what: str, **settings: Any) -> Case:
    """Return a case that compares the predicted with the measured memory, for which a few steps are enough."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    return Case(name=f"{size}-memory-{what}", size=size, settings=values, num_steps=3, num_warmup_steps=1)


LENGTHS = (512, 4096, 16384, 32768)
# Regimes that public measurements do not cover: bf16, double quantization, fused kernels, TRL's loss, all lengths.
MEMORY_CASES = (
    *(_memory("1b", f"{length}-tokens", data__max_length=length) for length in LENGTHS),
    _memory("1b", "padded", training__micro_batch_size=4, data__max_length=2048),
    _memory("1b", "packed", data__packing=True, data__max_length=4096),
    _memory("1b", "packed-flash", data__packing=True, data__max_length=4096, model__attention="flash_attention_2"),
    _memory("1b", "accumulation", training__gradient_accumulation_steps=4, data__max_length=2048),
    _memory("1b", "no-checkpointing", training__gradient_checkpointing="off", data__max_length=2048),
    _memory("1b", "selective", training__gradient_checkpointing="selective", data__max_length=2048),
    _memory("1b", "offload", training__gradient_checkpointing="offload", data__max_length=8192),
    _memory("1b", "eager", model__attention="eager", data__max_length=2048),
    _memory("1b", "flash-attention-2", model__attention="flash_attention_2", data__max_length=4096),
    _memory("1b", "single-quantization", quantization__double_quant=False),
    _memory("1b", "int8", quantization__method="int8"),
    _memory("1b", "16-bit", quantization__method="none", data__max_length=2048),
    _memory("1b", "fp32", model__dtype="fp32"),
    _memory("1b", "8-bit-adam", training__optimizer="adamw_8bit", lora__rank=64),
    _memory("1b", "paged-8-bit-adam", training__optimizer="paged_adamw_8bit", lora__rank=64),
    _memory("1b", "fused-adam", training__optimizer="adamw_torch_fused", lora__rank=64),
    _memory("2b-moe", "experts", data__max_length=2048),
    _memory("8b", "8192-tokens", data__max_length=8192),
    _memory("8b", "rank-64", lora__rank=64, data__max_length=2048),
    _memory("70b-wide", "2048-tokens", data__max_length=2048),
)

CASES = (
    *_loads("1b", "nf4", "fp4", "int8", "none"),
    Case(name="1b", size="1b", settings={"training.micro_batch_size": 4}),
    Case(
        name="1b-no-checkpointing",
        size="1b",
        settings={"training.micro_batch_size": 4, "training.gradient_checkpointing": "off"},
    ),
    Case(
        name="1b-16-bit",
        size="1b",
        settings={"training.micro_batch_size": 4, "quantization.method": "none"},
    ),
    # Mixtures of experts: int8 can't store them.
    *_loads("2b-moe", "nf4", "fp4", "none"),
    *_loads("8b", "nf4", "fp4", "int8", "none"),
    _load("8b", "nf4-offload-embedding", model__offload_embedding=True),
    Case(name="8b", size="8b", settings={"training.micro_batch_size": 2}),
    Case(name="8b-2048", size="8b", settings={"data.max_length": 2048}),
    Case(
        name="8b-2048-selective",
        size="8b",
        settings={"data.max_length": 2048, "training.gradient_checkpointing": "selective"},
    ),
    Case(
        name="8b-paged-8-bit-adam",
        size="8b",
        settings={"training.optimizer": "paged_adamw_8bit", "lora.rank": 64},
    ),
    *MEMORY_CASES,
    *_loads("tiny", "nf4", "int8", "none"),
    Case(name="tiny", size="tiny", settings={"data.max_length": 64, "training.micro_batch_size": 2}, num_steps=4),
    Case(name="tiny-packed", size="tiny", settings={"data.max_length": 64, "data.packing": True}, num_steps=4),
    Case(
        name="tiny-16-bit",
        size="tiny",
        settings={"data.max_length": 64, "quantization.method": "none"},
        num_steps=4,
    ),
    *_loads("tiny-moe", "nf4", "none"),
)
