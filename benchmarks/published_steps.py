"""The steps that trainers with published throughput run, as counted operations: as far as each is known.

They are told apart by the name of the trainer:

- `peft`: PEFT's layers and the model's own loss, traced;
- `peft+liger`: the same, with one kernel each for norm, RoPE and SwiGLU, and a fused loss;
- `gptq`: PEFT's layers around a GPTQ layer that dequantizes by operations of PyTorch (AutoGPTQ's
  `qlinear_cuda_old.py`);
- `unsloth`, and `compiled`, whose element-wise operations a compiler fuses: the published algorithm, by arithmetic
  (`published_algorithm.py`).
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.plain_loop import PlainStep
from benchmarks.published_algorithm import StepShape, published_operations, shape_of
from qlora_cli.errors import UsageError
from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.operation import Counted, OperationKind, Pass
from qlora_cli.timing.rates import Rates, rates_of
from qlora_cli.timing.roofline import Cost, cost_of

COMPILED, GPTQ, LIGER, PEFT, UNSLOTH = "compiled", "gptq", "peft+liger", "peft", "unsloth"
BY_FRAMEWORK = {"Unsloth": UNSLOTH, "Liger": LIGER, "torchtune": COMPILED, "Qwen finetune.py": GPTQ}
ATTENTION = {"FA2": "flash_attention_2", "eager": "eager", "SDPA": "sdpa", "SDPA/eager": "sdpa"}
WHOLE_MODULES = ["lm_head", "embed_tokens"]  # trained in full where a note says so
ONE_KERNEL_EACH = (OperationKind.NORM, OperationKind.ROPE, OperationKind.MLP, OperationKind.LOSS)
# bitsandbytes 0.48 made its kernel of dequantization 1.4 to 2.1 times faster on these (its pull request 1747); rows of
# this trainer are older.
OLDER, SLOWER_CAPABILITIES, TIMES_SLOWER = "LLaMA-Factory", ((7, 5), (8, 0), (9, 0)), 1.7
# What AutoGPTQ reads and writes for each weight of 4 bit, which its code moves as `int32` to shift it: the shift, the
# cast to `int8`, the mask, the difference from the zeros, the product with the scales.
GPTQ_BYTES = (0.5 + 4) + (4 + 1) + (1 + 1) + (1 + 1) + (1 + 2)
GPTQ_OPERATIONS = 14  # with those of the zeros, and of views
NF4_BYTES = 2.5  # by which the traced operation is scaled: codes, and 16-bit weights

# Qwen's first generation, by its published configs: a decoder as Qwen2's, with as many heads of keys as of queries.
QWEN = {
    "qwen-1.8b": (24, 2048, 16, 5504, 151_936),
    "qwen-7b": (32, 4096, 32, 11_008, 151_936),
    "qwen-14b": (40, 5120, 40, 13_696, 152_064),
    "qwen-72b": (80, 8192, 64, 24_576, 152_064),
}


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A measurement that someone published: tokens/s of a step of `rows` rows of `length` tokens."""

    id: str
    gpu: Gpu
    rates: Rates
    model: str
    framework: str
    is_nf4: bool
    attention: str
    length: int
    rows: int
    num_micro_batches: int
    rank: int
    trains_head: bool
    tokens_per_second: float

    @property
    def algorithm(self) -> str:
        """How the trainer computes."""
        return next((algorithm for name, algorithm in BY_FRAMEWORK.items() if name in self.framework), PEFT)


def read_row(content: Mapping[str, str]) -> PublishedRow:
    """Return a row of a file of published rows.

    Raises:
        ValueError: it does not say all, or the GPU is not in the catalogue.
    """
    unknown = [name for name, value in content.items() if value == "unknown"]
    if unknown:
        raise ValueError(f"not given are {', '.join(unknown)}")
    try:
        gpu = find_gpu(content["gpu"])
    except UsageError as error:
        raise ValueError(str(error)) from error
    rates = rates_of(gpu.card, gpu.num_sms)
    assert rates is not None, gpu.name
    return PublishedRow(
        id=content["id"],
        gpu=gpu,
        rates=rates,
        model=content["model"].lower(),
        framework=content["framework"],
        is_nf4="nf4" in content["base"],
        attention=ATTENTION[content["attention"]],
        length=int(content["seq_len"]),
        rows=int(content["micro_batch"]),
        num_micro_batches=int(content["grad_accum"]),
        rank=int(content["rank"]),
        trains_head="P. Schmid" in content["framework"],
        tokens_per_second=float(content["tokens_per_second"]),
    )


def config_of(row: PublishedRow) -> dict[str, Any]:
    """Return the config of the model of a row, with positions for its length."""
    if row.model in QWEN:
        layers, hidden, heads, intermediate, vocabulary = QWEN[row.model]
        config: dict[str, Any] = {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": intermediate,
            "vocab_size": vocabulary,
            "tie_word_embeddings": False,
        }
    else:
        model = find_in_catalogue(row.model)
        assert model is not None, row.model
        config = deepcopy(dict(model.config))
    return {**config, "max_position_embeddings": max(row.length, config.get("max_position_embeddings", 0))}


def settings_of(row: PublishedRow) -> EstimateSettings:
    """Return the settings of a published row, as far as they are known: layers are recomputed in all of them."""
    return EstimateSettings.model_validate(
        {
            "model": {"name": row.model, "attention": row.attention},
            "lora": {
                "rank": row.rank,
                "dropout": 0.05 if row.algorithm == GPTQ else 0.0,  # `finetune.py` of Qwen; others do not say
                "modules_to_save": WHOLE_MODULES if row.trains_head else None,
            },
            "data": {"max_length": row.length},
            "training": {
                "micro_batch_size": row.rows,
                "gradient_accumulation_steps": row.num_micro_batches,
                "gradient_checkpointing": "on",
                "fused_lora": False,
            },
        }
    )


def step_of(row: PublishedRow) -> tuple[Counted, Counted]:
    """Return the operations of a micro-batch and of the update of a published row."""
    settings = settings_of(row)
    estimator = Estimator(ModelFacts(name=row.model, content=config_of(row)), loop=PlainStep)
    run = estimator.traced(settings, row.gpu)
    shapes = estimator.shapes(settings, estimator.dtype_on(settings, row.gpu))
    shape = shape_of(shapes, rank=row.rank, rows=row.rows, length=row.length)
    micro_batch = run.micro_batch
    if row.algorithm in (UNSLOTH, COMPILED):
        micro_batch = tuple((1, operation) for operation in published_operations(shape))
    elif row.algorithm == GPTQ:
        micro_batch = with_gptq(micro_batch)
    elif row.algorithm == LIGER:
        micro_batch = with_liger(micro_batch, shape, trains_head=row.trains_head)
    return micro_batch, run.update


def costs_of(row: PublishedRow) -> tuple[Cost, Cost]:
    """Return the cost of a micro-batch and of the update of a published row.

    The host's part is left out where the operations are known by arithmetic alone.
    """
    micro_batch, update = step_of(row)
    rates = row.rates
    if OLDER in row.framework and row.gpu.capability in SLOWER_CAPABILITIES:
        rates = replace(rates, dequantized_bytes=rates.dequantized_bytes / TIMES_SLOWER)
    cost = cost_of(micro_batch, rates)
    if row.algorithm in (UNSLOTH, COMPILED):
        cost = replace(cost, host_seconds=0.0)
    return cost, cost_of(update, rates)


def with_gptq(operations: Counted) -> Counted:
    """Return the operations with weights dequantized as AutoGPTQ does: slowly, but not again in the backward pass."""
    result = []
    for times, operation in operations:
        if operation.kind != OperationKind.DEQUANTIZATION:
            result.append((times, operation))
        elif operation.run_in != Pass.BACKWARD:
            num_bytes = round(operation.num_bytes * GPTQ_BYTES / NF4_BYTES / GPTQ_OPERATIONS)
            part = replace(operation, kind=OperationKind.OTHER, num_bytes=num_bytes, kernels=1)
            result.append((times * GPTQ_OPERATIONS, part))
    return tuple(result)


def with_liger(operations: Counted, shape: StepShape, *, trains_head: bool) -> Counted:
    """Return the operations with the kernels of Liger; a trained head has the gradient of its weight as well."""
    kept = [(times, operation) for times, operation in operations if operation.kind not in ONE_KERNEL_EACH]
    fused = [operation for operation in published_operations(shape) if operation.kind in ONE_KERNEL_EACH]
    heads = [operation for operation in fused if operation.flops and operation.run_in == Pass.BACKWARD]
    return (*kept, *((1, operation) for operation in [*fused, *(heads if trains_head else [])]))
