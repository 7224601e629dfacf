"""Build the model of a run on the meta device, as it is stored: packed codes, constants, adapters, and no bytes.

The code that `train` loads and adapts with builds it.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter, place_adapter
from qlora_cli.adapters.initialization import why_not_on_quantized
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.trainable import why_not_trained_on
from qlora_cli.adapters.whole_modules import train_in_fp32
from qlora_cli.errors import ModelError
from qlora_cli.memory.tracing.layers import LayerStack, find_stack, keep_layers, renamed, representatives
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.settings.choices import DEFAULT_METHOD, LoraInit, quant_flag
from qlora_cli.settings.models import LoraSettings
from qlora_cli.settings.settle import varied


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A model on the meta device with the adapter attached, reduced to few layers.

    Attributes:
        model: What a step is traced through.
        stack: The layers of the whole model; None if it was not reduced.
        chosen: Which of them are in `model`.
        notes: What was said while the adapter was attached.
    """

    model: PeftModel
    stack: LayerStack | None
    chosen: tuple[int, ...]
    notes: tuple[str, ...]


def build_twin(
    model: PreTrainedModel,
    layout: StoragePlan,
    lora: LoraSettings,
    *,
    compute_dtype: torch.dtype,
    new_token_ids: tuple[int, ...] = (),
    adapter: Adapter | None = None,
    whole: bool = False,
) -> Twin:
    """Return the twin of `model`, which is on the meta device and becomes it, stored as `layout` says.

    `adapter` is one that trains on, in place of a new one by `lora`. `whole` keeps every layer, which takes longer and
    comes to the same.

    Raises:
        ModelError: an adapter can't be attached as asked.
    """
    on_experts = lora.target_parameters if adapter is None else adapter.lora.target_parameters
    if on_experts and not layout.experts:
        # PEFT's own wrapper switches autocast off by the name of the device, and PyTorch has none for this one.
        raise ModelError(
            "what adapters on experts take can't be predicted where the experts are not quantized",
            hint=f"Use {quant_flag([DEFAULT_METHOD])}, or leave lora.target_parameters out.",
        )
    names_layers = _names_layers(lora) if adapter is None else _chooses_layers(adapter.lora)
    stack, chosen = store_few_layers(model, layout, compute_dtype, whole=whole or names_layers)
    if adapter is not None:
        refusal = why_not_on_quantized(adapter.lora) if layout.is_quantized else None
        refusal = refusal or why_not_trained_on(adapter, model)
        trained = place_adapter(model, _to_train(adapter.lora), adapter.directory)
        train_in_fp32(trained)
        said = () if refusal is None else (f"qlora train would refuse this: {refusal}",)
        return Twin(model=trained, stack=stack, chosen=chosen, notes=said)
    # What a run takes does not depend on the values that it begins with, and there are none here.
    lora = varied(lora, init_lora_weights=LoraInit.DEFAULT)
    adapted, notes = attach_adapter(model, lora, new_token_ids)
    return Twin(model=adapted, stack=stack, chosen=chosen, notes=notes)


def store_few_layers(
    model: PreTrainedModel, layout: StoragePlan, compute_dtype: torch.dtype, *, whole: bool = False
) -> tuple[LayerStack | None, tuple[int, ...]]:
    """Reduce `model` to few layers and store it as `layout` says; return all its layers, and those that are left.

    With `whole`, or where the layers are not told apart, there is no stack, and all of them are left.
    """
    marks = {**layout.kept, **dict.fromkeys(layout.experts, "quantized")}
    stack = None if whole else find_stack(model, marks)
    chosen = tuple(representatives(stack.kinds)) if stack else ()
    kept, experts = tuple(layout.kept), layout.experts
    if stack:
        keep_layers(model, stack, chosen)
        kept, experts = _there(kept, stack, chosen), _there(experts, stack, chosen)
    # A checkpoint that came quantized is laid out as its own settings say, which `layout` has taken over.
    layout.method.store_on_meta(
        model, layout.settings, layout.dtype, kept=kept, experts=experts, compute_dtype=compute_dtype
    )
    return stack, chosen


def _names_layers(lora: LoraSettings) -> bool:
    """Whether targets are named with the number of their layer: then no layer stands for another."""
    targets = (lora.target_modules, lora.target_parameters, lora.modules_to_save)
    names = [name for target in targets if isinstance(target, tuple) for name in target]
    names += [*(lora.rank_pattern or {}), *(lora.alpha_pattern or {})]
    return any(part.isdigit() for name in names for part in name.split("."))


def _chooses_layers(lora: LoraConfig) -> bool:
    """Whether an adapter is not the same on every layer, as far as its config can tell."""
    if lora.layers_to_transform is not None or lora.layer_replication or isinstance(lora.target_modules, str):
        return True
    names = [*(lora.target_modules or ()), *(lora.target_parameters or ()), *(lora.modules_to_save or ())]
    names += [*(lora.rank_pattern or {}), *(lora.alpha_pattern or {})]
    return bool(lora.exclude_modules) or any(character.isdigit() for name in names for character in name)


def _to_train(lora: LoraConfig) -> LoraConfig:
    """Return a config for training on, without a beginning that needs values: there are none here."""
    config = deepcopy(lora)
    config.init_lora_weights, config.inference_mode = True, False
    return config


def _there(names: Sequence[str], stack: LayerStack, chosen: Sequence[int]) -> tuple[str, ...]:
    found = (renamed(name, stack, chosen) for name in names)
    return tuple(name for name in found if name is not None)
