"""Tracing steps of tiny models as the estimator does, and what tests compare: peaks and events of every pass."""

from copy import deepcopy
from typing import Any

import torch

from qlora_cli.memory.replaying.allocator import CachingAllocator
from qlora_cli.memory.tracing.meta_model import MetaModel, build_meta_model
from qlora_cli.memory.tracing.operation_count import OperationCount
from qlora_cli.memory.tracing.pair_step import LabelStep, PairStep
from qlora_cli.memory.tracing.passes import Passes
from qlora_cli.memory.tracing.training_step import StepSettings, TrainingStep
from qlora_cli.quantization.storage_plan import build_on_meta, plan_layout
from qlora_cli.settings.choices import SdpaBackend
from qlora_cli.settings.models import LoraSettings, QuantizationSettings
from qlora_cli.settings.objectives import Objective
from tests.support.models.tiny_models import FAMILIES, tiny_config

CUDA = torch.device("cuda")
LISTS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
DEPTHS = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")


def deep_config(family: str, num_layers: int = 7, **changes: Any) -> Any:
    """Return the tiny config of a family with about `num_layers` layers, lists of them repeated."""
    values = FAMILIES[family]
    depths = [name for name in DEPTHS if values.get(name)] or ["num_hidden_layers"]
    if "num_hidden_layers" not in values:
        depths.append("num_hidden_layers")
    deep: dict[str, Any] = dict.fromkeys(depths, num_layers)
    for name in LISTS:
        if pattern := values.get(name):
            deep[name] = [pattern[index % len(pattern)] for index in range(num_layers)]
    if "attention_types" in values:
        deep["attention_types"] = [[values["attention_types"][0][0], num_layers // 2]]
        deep |= dict.fromkeys(depths, num_layers // 2 * 2)
    if "attn_layer_indices" in values:
        deep["attn_layer_indices"] = list(range(1, num_layers, 2))
    if "hybrid_layer_ids" in values:
        deep["hybrid_layer_ids"] = list(range(1, num_layers, 2))
    return tiny_config(family, **{**deep, **changes})


def step_settings(**changes: Any) -> StepSettings:
    """Return a step in bf16 under autocast on an Ampere GPU, as `train` runs it."""
    values: dict[str, Any] = {
        "batch_size": 1,
        "length": 64,
        "gradient_accumulation_steps": 4,
        "checkpointing": "on",
        "attention": "sdpa",
        "backend": SdpaBackend.AUTO,
        "capability": (8, 0),
        "dtype": torch.bfloat16,
        "is_autocast": True,
        "fuses_lora": True,
        "evaluates": True,
        **changes,
    }
    is_padded = values["batch_size"] > 1 and not values.get("is_packed")
    return StepSettings(**{"is_padded": is_padded, **values})


class _Uncounted(OperationCount):
    def watch(self, *_: Any) -> list[Any]:
        return []

    def start(self) -> None:
        pass


class UncountedStep(TrainingStep):
    """A step whose operations are not counted, for tests of its memory, which counting does not change."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.operations = _Uncounted(self.trace, 1)


class UncountedPairs(UncountedStep, PairStep):
    """A step over pairs whose operations are not counted."""


class UncountedLabels(UncountedStep, LabelStep):
    """A step over answers with labels whose operations are not counted."""


def uncounted(objective: Objective) -> type[UncountedStep]:
    """Return the step of an objective whose operations are not counted."""
    if objective.has_labels:
        return UncountedLabels
    return UncountedPairs if objective.has_pairs else UncountedStep


def meta_model_of(
    config: Any,
    *,
    whole: bool,
    quantization: QuantizationSettings | None = None,
    **lora: Any,
) -> MetaModel:
    """Return the meta model of a config as `inspect-memory` builds it for a GPU."""
    shapes = build_on_meta(deepcopy(config), torch.bfloat16)  # turned into the meta model, together with its config
    layout = plan_layout(shapes, quantization or QuantizationSettings(), torch.bfloat16, device=CUDA)
    return build_meta_model(
        shapes,
        layout,
        LoraSettings(rank=8, **lora),
        compute_dtype=torch.bfloat16,
        whole=whole,
    )


def peaks(passes: Passes) -> dict[str, tuple[int, int]]:
    """Return what is allocated and reserved at the peak of each pass, in bytes."""
    peaks_of = {}
    allocator, live = CachingAllocator(), {}
    for name, events in passes.events.items():
        allocator.reset_peaks()
        for event in events:
            if event >= 0:
                live[event] = allocator.allocate(passes.storages[event].num_bytes)
            else:
                allocator.free(live.pop(~event))
        if events:
            peaks_of[name] = (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)
    return peaks_of
