"""Decide how each weight of a model is stored, and what that takes, from shapes alone: no weight is read.

The model is built on the meta device. What is predicted here is what `take_inventory` counts after loading, to the
byte; tests compare the two for every architecture.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_cli.errors import ModelError
from qlora_cli.model_files.construction import build_model
from qlora_cli.model_files.prequantized import Prequantized
from qlora_cli.quantization.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE
from qlora_cli.quantization.inventory import (
    IN_EVERY_PRODUCT,
    Entry,
    Inventory,
    classify,
    dtype_name,
    parameters_once,
)
from qlora_cli.quantization.kept import fused_experts, has_part, kept_layers, linear_layers
from qlora_cli.settings.choices import Quantization, Storage
from qlora_cli.settings.models import QuantizationSettings
from qlora_cli.units import format_bytes

STORAGE_DTYPES = {
    Storage.UINT8: torch.uint8,
    Storage.BF16: torch.bfloat16,
    Storage.FP16: torch.float16,
    Storage.FP32: torch.float32,
}
CODE_BYTES = 16 * 4  # the 16 levels, one table a weight
NESTED_CODE_BYTES = 256 * 4  # the levels of the constants, likewise
OFFSET_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the weights of a model are stored. `kept` are the linear layers and fused experts that are not quantized,
    by full name with the reason.

    `experts` are the full names of fused experts that are quantized; `prequantized`, that all comes so.
    """

    settings: QuantizationSettings
    dtype: torch.dtype
    kept: Mapping[str, str]
    experts: tuple[str, ...]
    prequantized: Prequantized | None
    inventory: Inventory

    @property
    def transient_bytes(self) -> int:
        """The most that is held beside the model while it is loaded: one weight before it is quantized.

        Its constants are in fp32 before they are quantized too. Fused experts that stay unquantized are put together
        from tensors that are there at the same time.
        """
        if self.prequantized is not None:
            return 0
        constants = 4 / BLOCK_SIZE if self.settings.method.is_4bit and self.settings.double_quant else 0
        return max(
            (
                int(entry.num_parameters * (self.dtype.itemsize + (constants if entry.is_quantized else 0)))
                for entry in self.inventory.entries
                if entry.is_quantized or entry.kind == "experts"
            ),
            default=0,
        )


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model without its weights: shapes only.

    Raises:
        ModelError: its architecture builds none of this config.
        MissingDependencyError: its code needs a package that is not installed.
    """
    with torch.device("meta"):
        return build_model(config, dtype, trust_remote_code=trust_remote_code)


def plan_layout(
    model: PreTrainedModel,
    settings: QuantizationSettings,
    dtype: torch.dtype,
    prequantized: Prequantized | None = None,
    *,
    device: torch.device,
) -> Layout:
    """Return the layout on `device` of `model`, which is on the meta device and in `dtype`.

    Raises:
        ModelError: nothing of it can be quantized as `settings` say, or its experts can't.
    """
    if prequantized is not None:
        kept = _kept_as_stored(model, prequantized.config)
        experts = tuple(prequantized.config.get("quantized_parameters") or ())
        kept |= {name: "as stored" for name, _ in fused_experts(model) if name not in experts}
        _check_skipped(model, settings.skip_modules, kept)
        _check_restorable(model, prequantized, kept, device)
    elif settings.method == Quantization.NONE:
        kept, experts = {name: "not asked for" for name, _ in linear_layers(model)}, ()
    else:
        kept = kept_layers(model, settings.skip_modules)
        _check_matches(model, settings.skip_modules or ())
        if settings.method.is_4bit and device.type == "cpu":
            kept = {**_wrong_on_cpu(model), **kept}
        experts = tuple(name for name, _ in fused_experts(model) if name not in kept)
        if experts and not settings.method.is_4bit:
            raise _no_place_for_experts(model, settings.method, experts)
        if not experts and all(name in kept for name, _ in linear_layers(model)):
            raise _nothing_to_quantize(model, settings.method, kept)
    inventory = _predict(model, settings, kept, experts)
    return Layout(
        settings=settings, dtype=dtype, kept=kept, experts=experts, prequantized=prequantized, inventory=inventory
    )


def _kept_as_stored(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a quantized checkpoint holds in 16 bit, by the rule that transformers reads it with."""
    patterns = HfQuantizer.get_modules_to_not_convert(
        model, config.get("llm_int8_skip_modules"), list(model._keep_in_fp32_modules or ())
    )
    reasons = kept_layers(model, None)
    return {
        name: reasons.get(name, "as stored")
        for name, module in linear_layers(model)
        if not should_convert_module(name, patterns) or reasons.get(name, "").startswith("a ")
    }


def _check_matches(model: PreTrainedModel, asked: tuple[str, ...]) -> None:
    names = [*(name for name, _ in linear_layers(model)), *(name for name, _ in fused_experts(model))]
    for part in asked:
        if not any(has_part(name, [part]) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise ModelError(
                f"quantization.skip_modules: {part!r} matches no layer of the model",
                hint=f"Its layers are {', '.join(leaves)}; any part of a full name between dots does.",
            )


def _check_skipped(model: PreTrainedModel, asked: tuple[str, ...] | None, kept: Mapping[str, str]) -> None:
    wanted = [name for name, reason in kept_layers(model, asked).items() if reason == "as asked"]
    if packed := [name for name in wanted if name not in kept]:
        raise ModelError(
            f"quantization.skip_modules is {','.join(asked or ())}, but the checkpoint holds {packed[0]} quantized",
            hint="Leave it out to load the checkpoint as it is, or give the 16-bit model.",
        )


def _wrong_on_cpu(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers and fused experts that bitsandbytes restores wrongly from 4 bit on a CPU.

    Its AVX-512 kernel (0.50) takes the constants of other blocks when a row does not end with a block. Such weights
    stay in 16 bit on every CPU, so that a run does not depend on which one it is.
    """
    widths = {name: _row_width(module) for name, module in linear_layers(model)}
    widths |= {name: shape[-1] for name, shape in fused_experts(model)}
    return {
        name: f"rows of {width} weights, no multiple of {BLOCK_SIZE}: bitsandbytes restores them wrongly on a CPU"
        for name, width in widths.items()
        if width % BLOCK_SIZE
    }


def _row_width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[-1]


def _check_restorable(
    model: PreTrainedModel, prequantized: Prequantized, kept: Mapping[str, str], device: torch.device
) -> None:
    if device.type != "cpu" or not prequantized.method.is_4bit:
        return
    wrong = [(name, reason) for name, reason in _wrong_on_cpu(model).items() if name not in kept]
    if wrong:
        name, reason = wrong[0]
        raise ModelError(
            f"{len(wrong)} weights can't be used on a CPU as they are stored: {name} has {reason}",
            hint="Use a GPU, or load the 16-bit model, whose weights of this shape are kept unquantized.",
        )


def _no_place_for_experts(model: PreTrainedModel, method: Quantization, experts: tuple[str, ...]) -> ModelError:
    total = sum(parameter.numel() for parameter in model.parameters())
    num_weights = sum(shape.numel() for name, shape in fused_experts(model) if name in experts)
    return ModelError(
        f"--quant {method.value} can't store fused experts: {format_bytes(2 * num_weights)} of "
        f"{format_bytes(2 * total)} would silently stay in 16 bit",
        hint="Use --quant nf4 or fp4, which quantize experts too; or keep them in 16 bit knowingly with "
        "--set quantization.skip_modules=experts",
    )


def _nothing_to_quantize(model: PreTrainedModel, method: Quantization, kept: Mapping[str, str]) -> ModelError:
    reasons = sorted(set(kept.values()))
    return ModelError(
        f"nothing of {type(model).__name__} can be stored in {method.value}: "
        f"{'; '.join(reasons) or 'it has no linear layer'}",
        hint="Load it with --quant none, for LoRA on a 16-bit base.",
    )


def _predict(
    model: PreTrainedModel,
    settings: QuantizationSettings,
    kept: Mapping[str, str],
    experts: tuple[str, ...],
) -> Inventory:
    entries: list[Entry] = []
    for name, module, parameter in parameters_once(model):
        kind, why_not = classify(name, module, parameter.dim(), kept)
        is_linear = kind == "linear layers" and why_not is None and name.endswith(".weight")
        if not (name in experts or (is_linear and settings.method != Quantization.NONE)):
            entries.append(_unquantized(model, name, kind, why_not, parameter))
        elif settings.method == Quantization.INT8:
            entries.append(_int8(name, kind, parameter, keeps_16_bit=settings.int8_has_fp16_weight))
        else:
            entries.append(_four_bit(name, kind, parameter.numel(), settings))
    buffer_bytes = sum(
        buffer.numel() * _stored_dtype(model, name, buffer).itemsize for name, buffer in model.named_buffers()
    )
    return Inventory(entries=tuple(entries), buffer_bytes=buffer_bytes)


def _stored_dtype(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that a tensor is loaded in: some are kept in fp32 by their architecture."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(tensor.dtype)
    return next((dtype for pattern, dtype in plan.items() if re.search(pattern, name)), tensor.dtype)


def _unquantized(model: PreTrainedModel, name: str, kind: str, why_not: str | None, parameter: nn.Parameter) -> Entry:
    dtype = _stored_dtype(model, name, parameter)
    return Entry(
        name=name,
        kind=kind,
        why_not=why_not or "not asked for",
        num_parameters=parameter.numel(),
        weight_bytes=parameter.numel() * dtype.itemsize,
        constant_bytes=0,
        dtype=dtype_name(dtype),
    )


def _int8(name: str, kind: str, parameter: nn.Parameter, *, keeps_16_bit: bool) -> Entry:
    num_rows = parameter.shape[0]
    return Entry(
        name=name,
        kind=kind,
        why_not=IN_EVERY_PRODUCT if keeps_16_bit else None,
        num_parameters=parameter.numel(),
        weight_bytes=parameter.numel() * (parameter.dtype.itemsize if keeps_16_bit else 1),
        constant_bytes=0 if keeps_16_bit else 4 * num_rows,
        dtype=dtype_name(parameter.dtype) if keeps_16_bit else "int8",
    )


def _four_bit(name: str, kind: str, count: int, settings: QuantizationSettings) -> Entry:
    """Return what a weight takes in 4 bit, by the closed form (QLoRA, arXiv 2305.14314, section 3)."""
    storage = STORAGE_DTYPES[settings.quant_storage]
    num_blocks = -(-count // BLOCK_SIZE)
    constants = 4 * num_blocks
    if settings.double_quant:
        constants = num_blocks + 4 * -(-num_blocks // NESTED_BLOCK_SIZE) + OFFSET_BYTES + NESTED_CODE_BYTES
    return Entry(
        name=name,
        kind=kind,
        why_not=None,
        num_parameters=count,
        weight_bytes=-(-count // 2),
        constant_bytes=constants + CODE_BYTES,
        dtype=dtype_name(storage),
    )
