"""Plan how each weight of a model is stored, and count its bytes, from shapes alone: no weight is read.

The model is built on the meta device. The prediction equals what `take_inventory` counts after loading, to the byte;
tests compare the two for every architecture.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_cli.errors import ModelError
from qlora_cli.model_files.construction import build_model
from qlora_cli.quantization.embedding import embedding_of
from qlora_cli.quantization.entries import Inventory, WeightEntry, dtype_name
from qlora_cli.quantization.inventory import classify, unique_parameters
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.methods.method import Method
from qlora_cli.quantization.methods.skip_modules import (
    fused_experts,
    has_part,
    linear_layers,
    tied_weights,
    unquantized_layers,
)
from qlora_cli.quantization.prequantized import Prequantized
from qlora_cli.settings.choices import METHODS, UNQUANTIZED_METHOD, Quantization, quant_flag
from qlora_cli.settings.models import QuantizationSettings
from qlora_cli.units import format_bytes

MOST_CUDA_WEIGHTS = 2**31 - 1  # of a tensor: an int in C


@dataclass(frozen=True, kw_only=True)
class StoragePlan:
    """How the weights of a model are stored.

    `unquantized` maps the full names of linear layers and fused experts to the reason; `experts` are the full names of
    the fused experts that are quantized; `prequantized` is set if the checkpoint is already quantized.
    """

    settings: QuantizationSettings
    dtype: torch.dtype
    unquantized: Mapping[str, str]
    experts: tuple[str, ...]
    prequantized: Prequantized | None
    inventory: Inventory

    @property
    def method(self) -> Method:
        """The method that stores the weights."""
        return method_of(self.settings.method)

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is quantized."""
        return any(entry.is_quantized for entry in self.inventory.entries)

    @property
    def extra_bytes(self) -> dict[str, int]:
        """What each layer that is quantized would take more unquantized, by full name.

        Layers are linear ones, and the fused weights of experts, each for itself.
        """
        return {
            entry.name if entry.name in self.experts else entry.name.removesuffix(".weight"): (
                entry.num_parameters * self.dtype.itemsize - entry.weight_bytes - entry.constant_bytes
            )
            for entry in self.inventory.entries
            if entry.is_quantized
        }

    def describe(self) -> str:
        """Describe in a few words how the model is stored: `NF4, double quantization`."""
        return self.method.describe(self.settings) + ("" if self.prequantized is None else ", as stored")

    @property
    def transient_bytes(self) -> int:
        """The peak memory of loading in addition to the model: one weight before it is quantized.

        Its constants may need more memory than afterwards. Unquantized fused experts are assembled from tensors that
        are in memory at the same time.
        """
        if self.prequantized is not None:
            return 0
        constants = self.method.transient_constant_bytes(self.settings)
        return max(
            (
                int(entry.num_parameters * (self.dtype.itemsize + (constants if entry.is_quantized else 0)))
                for entry in self.inventory.entries
                if entry.is_quantized or entry.kind == "experts"
            ),
            default=0,
        )


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model on the meta device: shapes without weights.

    Raises:
        ModelError: its architecture can't be built from this config.
        MissingDependencyError: its code needs a package that is not installed.
    """
    with torch.device("meta"):
        return build_model(config, dtype, trust_remote_code=trust_remote_code)


def with_rows(
    model: PreTrainedModel, config: PreTrainedConfig, num_rows: int, dtype: torch.dtype, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Return `model`, or one with `num_rows` rows if it has fewer, built from `config`, which is updated."""
    if num_rows <= embedding_of(model).num_embeddings:
        return model
    config.vocab_size = num_rows
    return build_on_meta(config, dtype, trust_remote_code=trust_remote_code)


def plan_layout(
    model: PreTrainedModel,
    settings: QuantizationSettings,
    dtype: torch.dtype,
    prequantized: Prequantized | None = None,
    *,
    device: torch.device,
) -> StoragePlan:
    """Return the storage plan on `device` for `model`, which is on the meta device and in `dtype`.

    Raises:
        ModelError: nothing can be quantized as `settings` say, or the experts can't, as those that are too large for
            CUDA kernels.
    """
    method = method_of(settings.method)
    if prequantized is not None:
        unquantized = _unquantized_as_stored(model, prequantized.unquantized)
        experts = tuple(prequantized.config.get("quantized_parameters") or ())
        unquantized |= {name: "as stored" for name, _ in fused_experts(model) if name not in experts}
        _check_skipped(model, settings.skip_modules, unquantized)
        _check_tied(model, unquantized)
        _check_restorable(model, prequantized, unquantized, device)
    elif not settings.method.is_quantized:
        unquantized, experts = {name: "not asked for" for name, _ in linear_layers(model)}, ()
    else:
        unquantized = unquantized_layers(model, settings.skip_modules)
        _check_matches(model, settings.skip_modules or ())
        unquantized = {**method.unsupported_weights(model, device), **unquantized}
        experts = tuple(name for name, _ in fused_experts(model) if name not in unquantized)
        if experts and not method.stores_experts:
            raise _experts_not_supported(model, settings.method, experts)
        if not experts and all(name in unquantized for name, _ in linear_layers(model)):
            raise _nothing_to_quantize(model, settings.method, unquantized)
    if device.type == "cuda":
        _check_counts(model, experts)
    inventory = _predict(model, settings, unquantized, experts)
    return StoragePlan(
        settings=settings,
        dtype=dtype,
        unquantized=unquantized,
        experts=experts,
        prequantized=prequantized,
        inventory=inventory,
    )


def _unquantized_as_stored(model: PreTrainedModel, named: list[str] | None) -> dict[str, str]:
    """Return the layers that a quantized checkpoint holds in 16 bit, by the rules of transformers.

    `named` are the modules that its config names as unquantized.
    """
    patterns = HfQuantizer.get_modules_to_not_convert(model, named, list(model._keep_in_fp32_modules or ()))
    reasons = unquantized_layers(model, None)
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
                f"{part!r} matches no layer of the model",
                hint=f"Its layers are {', '.join(leaves)}; any part of a full name between dots does.",
                setting="quantization.skip_modules",
            )


def _check_skipped(model: PreTrainedModel, asked: tuple[str, ...] | None, unquantized: Mapping[str, str]) -> None:
    requested = [name for name, reason in unquantized_layers(model, asked).items() if reason == "as asked"]
    if packed := [name for name in requested if name not in unquantized]:
        raise ModelError(
            f"{','.join(asked or ())} are to stay unquantized, but the checkpoint holds {packed[0]} quantized",
            hint="Leave it out to load the checkpoint as it is, or give the 16-bit model.",
            setting="quantization.skip_modules",
        )


def _check_tied(model: PreTrainedModel, unquantized: Mapping[str, str]) -> None:
    """Check that no layer that is tied to the embedding is stored quantized: it has no codes to read."""
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    if wrong := [name for name, _ in linear_layers(model) if name in tied and name not in unquantized]:
        raise ModelError(
            f"the checkpoint can't be used: it has {wrong[0]} quantized, which is tied to the embedding",
            hint=f"Write it again with {wrong[0]} among llm_int8_skip_modules, or give the 16-bit model.",
        )


def _check_restorable(
    model: PreTrainedModel, prequantized: Prequantized, unquantized: Mapping[str, str], device: torch.device
) -> None:
    unsupported_weights = method_of(prequantized.method).unsupported_weights(model, device)
    wrong = [(name, reason) for name, reason in unsupported_weights.items() if name not in unquantized]
    if wrong:
        name, reason = wrong[0]
        raise ModelError(
            f"{len(wrong)} weights can't be used on a {device.type.upper()} as they are stored: {name} has {reason}",
            hint="Use a GPU, or load the 16-bit model, whose weights of this shape are kept unquantized.",
        )


def _check_counts(model: PreTrainedModel, experts: tuple[str, ...]) -> None:
    """Check that CUDA kernels can dequantize each tensor of fused experts, which is done as a whole."""
    for name, shape in fused_experts(model):
        if name in experts and shape.numel() > MOST_CUDA_WEIGHTS:
            raise ModelError(
                f"{name} holds {shape.numel():,} weights, and the CUDA kernels of bitsandbytes count to "
                f"{MOST_CUDA_WEIGHTS:,}",
                hint="With enough memory, keep the experts in 16 bit: --set quantization.skip_modules=experts",
            )


def _experts_not_supported(model: PreTrainedModel, method: Quantization, experts: tuple[str, ...]) -> ModelError:
    total = sum(parameter.numel() for parameter in model.parameters())
    storing = quant_flag(other for other in METHODS if method_of(other).stores_experts)
    num_weights = sum(shape.numel() for name, shape in fused_experts(model) if name in experts)
    return ModelError(
        f"{method.value} can't store fused experts: {format_bytes(2 * num_weights)} of "
        f"{format_bytes(2 * total)} would silently stay in 16 bit",
        hint=f"Use {storing}, which quantize experts too; or keep them in 16 bit with "
        "--set quantization.skip_modules=experts",
        setting="quantization.method",
    )


def _nothing_to_quantize(model: PreTrainedModel, method: Quantization, unquantized: Mapping[str, str]) -> ModelError:
    reasons = sorted(set(unquantized.values()))
    return ModelError(
        f"nothing of {type(model).__name__} can be stored in {method.value}: "
        f"{'; '.join(reasons) or 'it has no linear layer'}",
        hint=f"Load it with {quant_flag([UNQUANTIZED_METHOD])}, for LoRA on a 16-bit base.",
    )


def _predict(
    model: PreTrainedModel,
    settings: QuantizationSettings,
    unquantized: Mapping[str, str],
    experts: tuple[str, ...],
) -> Inventory:
    entries: list[WeightEntry] = []
    for name, module, parameter in unique_parameters(model):
        kind, why_not = classify(name, module, parameter.dim(), unquantized)
        is_linear = kind == "linear layers" and why_not is None and name.endswith(".weight")
        if name in experts or is_linear:
            shape = parameter.T.shape if isinstance(module, Conv1D) else parameter.shape  # Conv1D stores (in, out)
            entries.append(method_of(settings.method).entry(name, kind, shape, parameter.dtype, settings))
        else:
            entries.append(_unquantized_entry(model, name, kind, why_not, parameter))
    buffer_bytes = sum(
        buffer.numel() * _stored_dtype(model, name, buffer).itemsize for name, buffer in model.named_buffers()
    )
    return Inventory(entries=tuple(entries), buffer_bytes=buffer_bytes)


def _stored_dtype(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that a tensor is loaded in: architectures keep some in fp32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(tensor.dtype)
    return next((dtype for pattern, dtype in plan.items() if re.search(pattern, name)), tensor.dtype)


def _unquantized_entry(
    model: PreTrainedModel, name: str, kind: str, why_not: str | None, parameter: nn.Parameter
) -> WeightEntry:
    dtype = _stored_dtype(model, name, parameter)
    return WeightEntry(
        name=name,
        kind=kind,
        why_not=why_not or "not asked for",
        num_parameters=parameter.numel(),
        weight_bytes=parameter.numel() * dtype.itemsize,
        constant_bytes=0,
        dtype=dtype_name(dtype),
    )
