"""Build the model of a run on the meta device, as it is stored: packed codes, constants, adapters, and no bytes.

`qlora` is built by the code that `train` loads and adapts with; `peft` as PEFT's own preparation leaves it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, modules
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, _register_parametrization_hooks
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.errors import ModelError
from qlora_cli.loading.weights import quantization_config
from qlora_cli.memory.layers import Stack, find_stack, keep_layers, renamed, representatives
from qlora_cli.memory.request import Recipe
from qlora_cli.quantization.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE
from qlora_cli.quantization.layout import STORAGE_DTYPES, Layout
from qlora_cli.settings.choices import LoraInit, Quantization
from qlora_cli.settings.models import LoraSettings

META = torch.device("meta")


class Params4bit(modules.Params4bit):  # type: ignore[misc] # bitsandbytes is untyped
    """Packed codes on the meta device. PEFT copies a layer to measure its weight for DoRA, and theirs can't be copied.

    PEFT knows quantized weights by the name of their class, so this one has the same.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> "Params4bit":
        return self  # there are no values that could change


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
    stack: Stack | None
    chosen: tuple[int, ...]
    notes: tuple[str, ...]


def build_twin(
    model: PreTrainedModel,
    layout: Layout,
    lora: LoraSettings,
    *,
    recipe: Recipe,
    compute_dtype: torch.dtype,
    new_token_ids: tuple[int, ...] = (),
    whole: bool = False,
) -> Twin:
    """Return the twin of `model`, which is on the meta device and becomes it, stored as `layout` says.

    `whole` keeps every layer, which takes longer and comes to the same.

    Raises:
        ModelError: an adapter can't be attached as asked.
    """
    marks = {**layout.kept, **dict.fromkeys(layout.experts, "quantized")}
    if lora.target_parameters is not None and not layout.experts:
        # PEFT's own wrapper switches autocast off by the name of the device, and PyTorch has none for this one.
        raise ModelError(
            "what adapters on experts take can't be predicted where the experts are not quantized",
            hint="Use --quant nf4, or leave lora.target_parameters out.",
        )
    stack = None if whole or _names_layers(lora) else find_stack(model, marks)
    chosen = tuple(representatives(stack.kinds)) if stack else ()
    kept, experts = tuple(layout.kept), layout.experts
    if stack:
        keep_layers(model, stack, chosen)
        kept, experts = _there(kept, stack, chosen), _there(experts, stack, chosen)
    _store(model, layout, kept, experts, compute_dtype)
    if recipe == Recipe.PEFT:
        return Twin(model=_as_peft_prepares(model, lora, layout), stack=stack, chosen=chosen, notes=())
    # What a run takes does not depend on the values that it begins with, and there are none here.
    lora = lora.model_copy(update={"init_lora_weights": LoraInit.DEFAULT})
    adapted, notes = attach_adapter(model, lora, new_token_ids)
    return Twin(model=adapted, stack=stack, chosen=chosen, notes=notes)


def _names_layers(lora: LoraSettings) -> bool:
    """Whether targets are named with the number of their layer: then no layer stands for another."""
    targets = (lora.target_modules, lora.target_parameters, lora.modules_to_save)
    names = [name for target in targets if isinstance(target, tuple) for name in target]
    names += [*(lora.rank_pattern or {}), *(lora.alpha_pattern or {})]
    return any(part.isdigit() for name in names for part in name.split("."))


def _there(names: Sequence[str], stack: Stack, chosen: Sequence[int]) -> tuple[str, ...]:
    found = (renamed(name, stack, chosen) for name in names)
    return tuple(name for name in found if name is not None)


def _store(
    model: PreTrainedModel, layout: Layout, kept: Sequence[str], experts: Sequence[str], compute_dtype: torch.dtype
) -> None:
    """Replace what is quantized by what bitsandbytes computes with."""
    if layout.settings.method == Quantization.NONE:
        return
    is_4bit = layout.settings.method.is_4bit
    # A checkpoint that came quantized is laid out as its own settings say, which `layout` has taken over.
    config = quantization_config(
        Layout(
            settings=layout.settings,
            dtype=layout.dtype,
            kept=dict.fromkeys(kept, ""),
            experts=tuple(experts),
            prequantized=None,
            inventory=layout.inventory,
        ),
        compute_dtype,
    )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if set(linears) - set(kept):
        replace_with_bnb_linear(model, list(kept), config)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            module.weight, module.quant_state = _packed(module.weight.shape, layout, module)
        elif isinstance(module, Linear8bitLt):
            _fill_int8(module)
        if name in linears and isinstance(module, Linear4bit | Linear8bitLt) and module.bias is not None:
            bias = linears[name].bias
            assert bias is not None
            module.bias = nn.Parameter(torch.empty_like(bias), requires_grad=False)
    for name in experts:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        packed, state = _packed(getattr(module, leaf).shape, layout, None)
        setattr(module, leaf, nn.Parameter(packed.data, requires_grad=False))
        register_parametrization(module, leaf, Bnb4bitParametrization(state), unsafe=True)
        _register_parametrization_hooks(module, leaf)
    # What PEFT asks a quantized model for.
    for name, value in (("is_loaded_in_4bit", is_4bit), ("is_loaded_in_8bit", not is_4bit)):
        setattr(model, name, value)
    model.config.quantization_config = config


def _packed(shape: torch.Size, layout: Layout, module: Linear4bit | None) -> tuple[Params4bit, functional.QuantState]:
    settings = layout.settings
    codes, state = functional.quantize_4bit(
        torch.empty(shape, dtype=layout.dtype, device=META),
        blocksize=BLOCK_SIZE,
        quant_type=settings.method.value,
        quant_storage=STORAGE_DTYPES[settings.quant_storage],
    )
    if settings.double_quant:
        _nest(state)
    weight = Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=settings.double_quant,
        quant_type=settings.method.value,
        quant_storage=STORAGE_DTYPES[settings.quant_storage],
        module=module,
        bnb_quantized=True,
    )
    return weight, state


def _nest(state: functional.QuantState) -> None:
    """Quantize the constants by hand: bitsandbytes would keep the levels on this device, and use them on any."""
    num_blocks = state.absmax.numel()
    state.nested = True
    state.offset = torch.empty((), dtype=torch.float32, device=META)
    state.absmax = torch.empty(num_blocks, dtype=torch.uint8, device=META)
    state.state2 = functional.QuantState(
        absmax=torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device=META),
        blocksize=NESTED_BLOCK_SIZE,
        code=torch.empty(256, dtype=torch.float32, device=META),
        dtype=torch.float32,
    )


def _fill_int8(module: Linear8bitLt) -> None:
    shape = module.weight.shape
    if module.state.has_fp16_weights:
        return
    codes = torch.empty(shape, dtype=torch.int8, device=META)
    scales = torch.empty(shape[0], dtype=torch.float32, device=META)
    module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def _as_peft_prepares(model: PreTrainedModel, lora: LoraSettings, layout: Layout) -> PeftModel:
    """Return the model as `prepare_model_for_kbit_training` and `get_peft_model` leave it: all else in fp32."""
    if lora.target_parameters is not None:
        raise ModelError("--recipe peft has no adapters on experts", hint="Leave lora.target_parameters out.")
    model.requires_grad_(False)
    if layout.settings.method != Quantization.NONE:
        # Checkpointing is switched on by the step, as the settings say.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = "all-linear" if lora.target_modules == "all-linear" else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        rank_pattern=dict(lora.rank_pattern or {}),
        alpha_pattern=dict(lora.alpha_pattern or {}),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            # PEFT, of patterns that it adds for experts by itself.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"the adapter can't be attached: {error}", hint="Check --target-modules.") from error
