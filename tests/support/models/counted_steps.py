"""The counted operations of traced steps of tiny models."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.traced_run import TracedRun
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.operation import OperationKind, Pass

GPU = find_gpu("RTX 4090")
RANK, TOKENS = 8, 96
Sums = dict[tuple[OperationKind, Pass], tuple[int, int, int]]
ONE_LAYER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
LINEARS = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))  # (in, out): q k v o gate up down
NUM_WEIGHTS = sum(wide * narrow for wide, narrow in LINEARS)
LORA_FLOPS = 2 * TOKENS * RANK * sum(wide + narrow for wide, narrow in LINEARS)
ATTENTION_FLOPS = 2 * TOKENS**2 * 64  # the causal half of two products of 4 heads, 16 wide
HEAD_FLOPS = 2 * (TOKENS - 1) * 512 * 64  # the first token is no target


def settings_of(
    checkpointing: str, *, fused: bool = True, model: Mapping[str, Any] | None = None, **training: Any
) -> EstimateSettings:
    """Return the settings of a step of one row; `model` and `training` are those of these sections."""
    return EstimateSettings.model_validate(
        {
            "model": {"name": "tiny", **(model or {})},
            "lora": {"rank": RANK},
            "data": {"max_length": TOKENS},
            "training": {
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": checkpointing,
                "fused_lora": fused,
                **training,
            },
        }
    )


def traced(config: Any, checkpointing: str, *, whole: bool = False, fused: bool = True, **training: Any) -> TracedRun:
    """Return the traced run of a config."""
    estimator = Estimator(ModelFacts(name="tiny", content=config.to_dict()), whole=whole)
    return estimator.traced(settings_of(checkpointing, fused=fused, **training), GPU)


def counted(config: Any, checkpointing: str, **options: Any) -> Sums:
    """Return how many operations, FLOPs and bytes a micro-batch has, by kind and pass."""
    sums: dict[tuple[OperationKind, Pass], list[int]] = defaultdict(lambda: [0, 0, 0])
    for times, operation in traced(config, checkpointing, **options).micro_batch:
        for index, amount in enumerate((1, operation.flops, operation.num_bytes)):
            sums[operation.kind, operation.run_in][index] += times * amount
    return {key: (number, flops, num_bytes) for key, (number, flops, num_bytes) in sums.items()}


def flops_by_kind(sums: Sums) -> dict[tuple[OperationKind, Pass], int]:
    return {key: flops for key, (_, flops, _) in sums.items() if flops}
