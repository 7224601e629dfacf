"""Settings that a sharded base can't be used with."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.settings.choices import LoraInit, Quantization, Strategy
from qlora_cli.settings.conflict import Conflict

STRATEGY = "training.strategy"


def sharding_conflicts(validated: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield what `--strategy fsdp` can't be used with; `validated` are the sections of a run."""
    training = validated["training"]
    if training.strategy != Strategy.FSDP:
        return
    if "inspect_memory" in validated:
        yield STRATEGY, "the memory of a sharded base is not predicted yet", "Leave --strategy out, or use ddp."
    else:
        for what, why, hint in sharding_problems(validated):
            yield STRATEGY, f"--strategy fsdp can't be used with {what}: {why}", hint


def sharding_problems(validated: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the settings of a run with which its base can't be sharded: what, why, and a hint."""
    training, lora, model = validated["training"], validated["lora"], validated["model"]
    method, without = validated["quantization"].method, "Use --strategy ddp, or leave it out."
    if method == Quantization.INT8:
        yield "--quant int8", "bitsandbytes keeps a copy of each 8-bit weight of its own", "Use --quant nf4."
    if method == Quantization.AUTO:
        yield "--quant auto", "which method fits is predicted for a whole base", "Use --quant nf4 or none."
    if training.auto_micro_batch:
        why = "a process that runs out of memory within a layer ends the others"
        yield "--auto-micro-batch", why, "Give a --micro-batch-size that fits."
    if training.torch_compile:
        yield "training.torch_compile", "compiled layers were not tried with it", "Leave torch_compile out."
    if model.offload_embedding:
        yield "--offload-embedding", "the embedding is sharded, too", "Leave --offload-embedding out."
    if lora.use_dora:
        yield "lora.use_dora", "magnitudes are computed from whole weights", without
    if lora.modules_to_save:
        yield "lora.modules_to_save", "a module that is trained whole is not sharded", without
    if lora.init_lora_weights in (LoraInit.PISSA, LoraInit.LOFTQ):
        name = f"lora.init_lora_weights={lora.init_lora_weights.value}"
        yield name, "the matrices are made from whole weights", "Use default, gaussian or orthogonal."
