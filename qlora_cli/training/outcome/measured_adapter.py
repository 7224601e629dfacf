"""Measure what training made of an adapter, module by module, while the model is in memory."""

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch.distributed.tensor import DTensor

from qlora_cli.adapters.initialization import base_change
from qlora_cli.adapters.keys import in_base
from qlora_cli.adapters.targets import ADAPTER
from qlora_cli.quantization.methods import held_weight
from qlora_cli.runs.adapter_health import AdapterHealth, ModuleHealth
from qlora_cli.training.outcome.low_rank import UpdateFactors, effective_rank, lost_share

MERGE_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@torch.no_grad()
def measure_adapter(model: PeftModel) -> AdapterHealth | None:
    """Return the size and the effective rank of each module's update, and what a merge into 16 bit rounds off.

    A merge is taken to be in the dtype that the base is stored in, if that has 16 bits, otherwise in bf16. None if no
    module has an update of low rank, or the adapter holds a part of its base (PiSSA, OLoRA).
    """
    if base_change(model.peft_config[ADAPTER]) is not None:
        return None
    stored = getattr(model.get_base_model().config, "dtype", None)
    dtype = stored if stored in MERGE_DTYPES else torch.bfloat16
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    measurable = {name: layer for name, layer in layers.items() if not isinstance(layer, ParamWrapper)}
    return AdapterHealth.of_modules(
        (_module_health(in_base(name), layer, dtype) for name, layer in measurable.items()),
        merge_dtype=MERGE_DTYPES[dtype],
        num_unmeasured=len(layers) - len(measurable),
    )


def _module_health(name: str, layer: LoraLayer, dtype: torch.dtype) -> ModuleHealth:
    factors = _factors_of(layer)
    values = factors.singular_values()
    weight = _weight_of(layer)
    is_added = not layer.use_dora.get(ADAPTER, False)
    return ModuleHealth(
        name=name,
        rank=factors.rank,
        update_norm=float(values.norm()),
        weight_norm=None if weight is None else float(weight.float().norm()),
        effective_rank=effective_rank(values),
        lost_share=lost_share(factors, weight, dtype) if weight is not None and is_added else None,
    )


def _factors_of(layer: LoraLayer) -> UpdateFactors:
    if isinstance(layer, LoraEmbedding):
        left, right = layer.lora_embedding_B[ADAPTER], layer.lora_embedding_A[ADAPTER]
    else:
        left, right = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
    return UpdateFactors(left=left.float(), right=right.float(), scale=float(layer.scaling[ADAPTER]))


def _weight_of(layer: LoraLayer) -> torch.Tensor | None:
    """Return the weight of the base as (out, in), dequantized; None if this process holds a part of it only."""
    base = layer.get_base_layer()
    if isinstance(base.weight, DTensor):
        return None
    weight = held_weight(base)
    is_transposed = isinstance(layer, LoraEmbedding) or getattr(layer, "fan_in_fan_out", False)
    return weight.T if is_transposed else weight
