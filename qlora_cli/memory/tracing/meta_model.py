"""Build the model of a run on the meta device as it is stored: packed codes, constants and adapters, but no bytes.

The adapter is attached by the code that `train` runs.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter, attach_from_config
from qlora_cli.adapters.initialization import quantized_base_problem
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.trainable import further_training_problem
from qlora_cli.adapters.whole_modules import train_in_fp32
from qlora_cli.errors import ModelError
from qlora_cli.memory.tracing.layers import LayerStack, find_stack, reduce_to, renamed, representatives
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.settings.choices import DEFAULT_METHOD, LoraInit, quant_flag
from qlora_cli.settings.models import LoraSettings
from qlora_cli.settings.settle import with_values


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A model on the meta device with the adapter attached, reduced to few layers.

    Attributes:
        model: The reduced model that a step is traced through.
        stack: The layers of the whole model; None if it was not reduced.
        chosen: The indices of the layers that are in `model`.
        notes: Messages from attaching the adapter.
    """

    model: PeftModel
    stack: LayerStack | None
    chosen: tuple[int, ...]
    notes: tuple[str, ...]


def build_meta_model(
    model: PreTrainedModel,
    layout: StoragePlan,
    lora: LoraSettings,
    *,
    compute_dtype: torch.dtype,
    new_token_ids: tuple[int, ...] = (),
    adapter: Adapter | None = None,
    whole: bool = False,
) -> MetaModel:
    """Store `model`, which is on the meta device, as planned by `layout`, attach an adapter and return the result.

    `adapter` is an existing one to train further, instead of a new one by `lora`. `whole` retains every layer, which
    takes longer and gives the same result.

    Raises:
        ModelError: an adapter can't be attached as asked.
    """
    on_experts = lora.target_parameters if adapter is None else adapter.lora.target_parameters
    if on_experts and not layout.experts:
        # PEFT's wrapper disables autocast for the device of the weight, and PyTorch has no autocast for meta.
        raise ModelError(
            "the memory of adapters on experts can't be predicted where the experts are not quantized",
            hint=f"Use {quant_flag([DEFAULT_METHOD])}, or leave lora.target_parameters out.",
        )
    names_layers = _names_layers(lora) if adapter is None else _selects_layers(adapter.lora)
    stack, chosen = store_few_layers(model, layout, compute_dtype, whole=whole or names_layers)
    if adapter is not None:
        refusal = quantized_base_problem(adapter.lora) if layout.is_quantized else None
        refusal = refusal or further_training_problem(adapter, model)
        trained = attach_from_config(model, _training_config(adapter.lora), adapter.directory)
        train_in_fp32(trained)
        warnings = () if refusal is None else (f"qlora train would refuse this: {refusal}",)
        return MetaModel(model=trained, stack=stack, chosen=chosen, notes=warnings)
    # Memory does not depend on initial values, and meta tensors have none to compute with.
    lora = with_values(lora, init_lora_weights=LoraInit.DEFAULT)
    adapted, notes = attach_adapter(model, lora, new_token_ids)
    return MetaModel(model=adapted, stack=stack, chosen=chosen, notes=notes)


def store_few_layers(
    model: PreTrainedModel, layout: StoragePlan, compute_dtype: torch.dtype, *, whole: bool = False
) -> tuple[LayerStack | None, tuple[int, ...]]:
    """Reduce `model` to a few layers stored as planned by `layout`; return the stack and the indices of these layers.

    With `whole`, or if the structure of the model shows no stack, nothing is reduced and the stack is None.
    """
    marks = {**layout.unquantized, **dict.fromkeys(layout.experts, "quantized")}
    stack = None if whole else find_stack(model, marks)
    chosen = tuple(representatives(stack.kinds)) if stack else ()
    unquantized, experts = tuple(layout.unquantized), layout.experts
    if stack:
        reduce_to(model, stack, chosen)
        unquantized, experts = _renamed_all(unquantized, stack, chosen), _renamed_all(experts, stack, chosen)
    # For a checkpoint that is quantized already, `layout.settings` are its own.
    layout.method.store_on_meta(
        model, layout.settings, layout.dtype, unquantized=unquantized, experts=experts, compute_dtype=compute_dtype
    )
    return stack, chosen


def _names_layers(lora: LoraSettings) -> bool:
    """Return whether targets are named with the number of their layer: then no layer represents another."""
    targets = (lora.target_modules, lora.target_parameters, lora.modules_to_save)
    names = [name for target in targets if isinstance(target, tuple) for name in target]
    names += [*(lora.rank_pattern or {}), *(lora.alpha_pattern or {})]
    return any(part.isdigit() for name in names for part in name.split("."))


def _selects_layers(lora: LoraConfig) -> bool:
    """Return whether an adapter may differ between layers, as far as its config shows."""
    if lora.layers_to_transform is not None or lora.layer_replication or isinstance(lora.target_modules, str):
        return True
    names = [*(lora.target_modules or ()), *(lora.target_parameters or ()), *(lora.modules_to_save or ())]
    names += [*(lora.rank_pattern or {}), *(lora.alpha_pattern or {})]
    return bool(lora.exclude_modules) or any(character.isdigit() for name in names for character in name)


def _training_config(lora: LoraConfig) -> LoraConfig:
    """Return a config for training an adapter further, without an initialization that computes from weights."""
    config = deepcopy(lora)
    config.init_lora_weights, config.inference_mode = True, False
    return config


def _renamed_all(names: Sequence[str], stack: LayerStack, chosen: Sequence[int]) -> tuple[str, ...]:
    """Return the names, in the reduced model, of the modules `names` that it contains."""
    reduced = (renamed(name, stack, chosen) for name in names)
    return tuple(name for name in reduced if name is not None)
