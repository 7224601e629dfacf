"""Build the model of a run on the meta device, as it is stored: packed codes, constants, adapters, and no bytes.

`qlora` is built by the code that `train` loads and adapts with; `peft` as PEFT's own preparation leaves it.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter, place_adapter
from qlora_cli.adapters.initialization import why_not_on_quantized
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.trainable import why_not_trained_on
from qlora_cli.adapters.whole_modules import train_in_fp32
from qlora_cli.errors import ModelError
from qlora_cli.memory.tracing.layers import LayerStack, find_stack, keep_layers, renamed, representatives
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.settings.choices import DEFAULT_METHOD, LoraInit, Recipe, quant_flag
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
    recipe: Recipe,
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
    marks = {**layout.kept, **dict.fromkeys(layout.experts, "quantized")}
    on_experts = lora.target_parameters if adapter is None else adapter.lora.target_parameters
    if on_experts and not layout.experts:
        # PEFT's own wrapper switches autocast off by the name of the device, and PyTorch has none for this one.
        raise ModelError(
            "what adapters on experts take can't be predicted where the experts are not quantized",
            hint=f"Use {quant_flag([DEFAULT_METHOD])}, or leave lora.target_parameters out.",
        )
    names_layers = _names_layers(lora) if adapter is None else _chooses_layers(adapter.lora)
    stack = None if whole or names_layers else find_stack(model, marks)
    chosen = tuple(representatives(stack.kinds)) if stack else ()
    kept, experts = tuple(layout.kept), layout.experts
    if stack:
        keep_layers(model, stack, chosen)
        kept, experts = _there(kept, stack, chosen), _there(experts, stack, chosen)
    # A checkpoint that came quantized is laid out as its own settings say, which `layout` has taken over.
    layout.method.store_on_meta(
        model, layout.settings, layout.dtype, kept=kept, experts=experts, compute_dtype=compute_dtype
    )
    if recipe == Recipe.PEFT:
        peft = _as_peft_prepares(model, _peft_config(lora) if adapter is None else _to_train(adapter.lora), layout)
        return Twin(model=peft, stack=stack, chosen=chosen, notes=())
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


def _peft_config(lora: LoraSettings) -> LoraConfig:
    """Return settings as a plain loop hands them to PEFT."""
    targets = "all-linear" if lora.target_modules == "all-linear" else list(lora.target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        rank_pattern=dict(lora.rank_pattern or {}),
        alpha_pattern=dict(lora.alpha_pattern or {}),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_parameters=list(lora.target_parameters) if lora.target_parameters else None,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
        bias="none",
    )


def _as_peft_prepares(model: PreTrainedModel, config: LoraConfig, layout: StoragePlan) -> PeftModel:
    """Return the model as `prepare_model_for_kbit_training` and `get_peft_model` leave it: all else in fp32."""
    if config.target_parameters:
        raise ModelError(
            "peft has no adapters on experts",
            hint="Leave lora.target_parameters out.",
            setting="inspect_memory.recipe",
        )
    model.requires_grad_(False)
    if layout.settings.method.is_quantized:
        # Checkpointing is switched on by the step, as the settings say.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():
            # PEFT, of patterns that it adds for experts by itself.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"the adapter can't be attached: {error}", hint="Check --target-modules.") from error
