"""NF4 and FP4 (QLoRA, arXiv 2305.14314, section 3): two codes a byte, and a constant for each block of weights.

How they are quantized is in `blocks`, while a model is loaded in `four_bit_quantizer`, and as training saw them in
`round_trip`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes import nn as bnb
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, _register_parametrization_hooks
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.errors import ModelError
from qlora_cli.quantization.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE, FourBit
from qlora_cli.quantization.entries import WeightEntry, dtype_name
from qlora_cli.quantization.lost_weights import Losses
from qlora_cli.quantization.methods.bitsandbytes import KEPT, is_stored_by, replace_layers
from qlora_cli.quantization.methods.four_bit_quantizer import LOADER, QloraConfig, QloraQuantizer
from qlora_cli.quantization.methods.method import (
    META,
    ORIGINAL,
    Allocation,
    Inside,
    Method,
    Operator,
    Saving,
    StoredWeight,
    WeightPart,
)
from qlora_cli.quantization.methods.skip_modules import fused_experts, linear_layers
from qlora_cli.quantization.round_trip import Quantized, quantized
from qlora_cli.settings.choices import Quantization, Storage
from qlora_cli.settings.models import QuantizationSettings

STORAGE_DTYPES = {
    Storage.UINT8: torch.uint8,
    Storage.BF16: torch.bfloat16,
    Storage.FP16: torch.float16,
    Storage.FP32: torch.float32,
}
STORED = "load_in_4bit"  # in the config of a checkpoint
CODE_BYTES = 16 * 4  # the 16 levels, one table a weight
NESTED_CODE_BYTES = 256 * 4  # the levels of the constants, likewise
OFFSET_BYTES = FLOAT_BYTES = 4
# What bitsandbytes stores with packed codes.
CONSTANT = re.compile(r"(.*)\.((nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+)")


def _product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inside:
    """Return what a product with a 4-bit weight takes in the forward pass.

    `bitsandbytes/backends/cuda/ops.py`: beyond 1536 rows the whole weight is dequantized and multiplied by cuBLAS;
    with double quantization its constants are too, to fp32. Below, a fused kernel may need neither, by rules of speed
    for each GPU: what it saves is no part of a peak, since the backward pass always dequantizes.
    """
    activations, shape = args[0], args[2]
    num_weights = prod(shape)
    constants = num_weights // args[4] * FLOAT_BYTES if kwargs.get("absmax_8bit") is not None else 0
    weight = num_weights * activations.element_size()
    return Inside(before=(constants, weight) if constants else (weight,), uses_cublas=True)


class FourBitMethod(Method):
    """NF4 or FP4, whichever `settings.method` says."""

    loader = LOADER
    kept_key = KEPT
    stored_key = STORED
    stores_experts = True
    layer_types = (bnb.Linear4bit,)
    parametrization_types = (Bnb4bitParametrization,)
    operators = MappingProxyType({"bitsandbytes::gemm_4bit": Operator(inside=_product)})

    def describe(self, settings: QuantizationSettings) -> str:
        """Return the kind of codes, and how often their constants are quantized."""
        return f"{super().describe(settings)}, {'double' if settings.double_quant else 'single'} quantization"

    def savings(self, settings: QuantizationSettings) -> Iterator[Saving]:
        """Yield double quantization (section 3), where it is off."""
        if not settings.double_quant:
            effect = "the weights' scales in 8 bit, their error stays nearly the same"
            yield Saving(key="double_quant", value=True, effect=effect)

    def unstorable(self, model: PreTrainedModel, device: torch.device) -> Mapping[str, str]:
        """Return the linear layers and fused experts that bitsandbytes restores wrongly on a CPU.

        Its AVX-512 kernel (0.50) takes the constants of other blocks when a row does not end with a block. Such
        weights stay in 16 bit on every CPU, so that a run does not depend on which one it is.
        """
        if device.type != "cpu":
            return {}
        widths = {name: _row_width(module) for name, module in linear_layers(model)}
        widths |= {name: shape[-1] for name, shape in fused_experts(model)}
        return {
            name: f"rows of {width} weights, no multiple of {BLOCK_SIZE}: bitsandbytes restores them wrongly on a CPU"
            for name, width in widths.items()
            if width % BLOCK_SIZE
        }

    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return what a weight takes, by the closed form (section 3)."""
        count = shape.numel()
        num_blocks = -(-count // BLOCK_SIZE)
        constants = FLOAT_BYTES * num_blocks
        if settings.double_quant:
            num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
            constants = num_blocks + FLOAT_BYTES * num_nested + OFFSET_BYTES + NESTED_CODE_BYTES
        return WeightEntry(
            name=name,
            kind=kind,
            why_not=None,
            num_parameters=count,
            weight_bytes=-(-count // 2),
            constant_bytes=constants + CODE_BYTES,
            dtype=dtype_name(STORAGE_DTYPES[settings.quant_storage]),
        )

    def transient_constant_bytes(self, settings: QuantizationSettings) -> float:
        """Return what the constants take in fp32, before they are quantized too."""
        return FLOAT_BYTES / BLOCK_SIZE if settings.double_quant else 0.0

    def stored(self, module: nn.Module, name: str, parameter: nn.Parameter) -> StoredWeight | None:
        """Return how `parameter` is stored, if it holds the codes of a layer or of fused experts."""
        if isinstance(parameter, bnb.Params4bit) and parameter.quant_state is not None:
            return _stored(parameter.quant_state)
        chains: dict[str, Any] = dict(getattr(module, "parametrizations", {}))
        parts = (part for part in chains.get(name, ()) if isinstance(part, Bnb4bitParametrization))
        return next((_stored(part.quant_state) for part in parts), None)

    def config(
        self,
        settings: QuantizationSettings,
        *,
        unquantized: Sequence[str],
        experts: Sequence[str],
        compute_dtype: torch.dtype,
        measure_error: bool = False,
        losses: Losses | None = None,
    ) -> QloraConfig:
        """Return what `QloraQuantizer` goes by, every field set: transformers' default is FP4 in fp32."""
        return QloraConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.method.value,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=STORAGE_DTYPES[settings.quant_storage],
            llm_int8_skip_modules=list(unquantized),
            quantized_parameters=list(experts),
            measure_error=measure_error,
            losses=losses,
        )

    def refused_weights(self, config: QuantizationConfigMixin) -> Mapping[str, ModelError]:
        """Return the weights that were refused while a model was read by `config`, by full name, with why."""
        assert isinstance(config, QloraConfig)
        return config.refused.errors

    def settle(self, model: PreTrainedModel) -> None:
        """Keep the stored bytes: on CPUs with AVX512-BF16, bitsandbytes repacks them at the first evaluation.

        It computes with bf16 scales then: another model than the one that trains, and other bytes than those loaded.
        """
        for module in model.modules():
            if isinstance(module, bnb.Linear4bit):
                module.support_avx512bf16_for_cpu = False

    def measured_errors(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the relative error of each weight, by full name, that was measured while `model` was loaded."""
        quantizer = getattr(model, "hf_quantizer", None)
        assert isinstance(quantizer, QloraQuantizer), "errors are measured while quantizing to 4 bit"
        return dict(quantizer.quantization_config.errors or {})

    def claim(self, quant_method: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return `config` if it says that weights are in 4 bit; with quantized experts it has a method of its own."""
        if quant_method == LOADER:  # it is left out of the file, as transformers would take it for its own
            return {**config, STORED: True}
        return config if is_stored_by(STORED, quant_method, config) else None

    def stored_settings(self, config: Mapping[str, Any], name: str) -> dict[str, object]:
        """Return the kind of codes, their storage, and whether their constants are quantized too.

        Raises:
            ModelError: the codes are of another kind.
        """
        kind = config.get("bnb_4bit_quant_type", Quantization.FP4)  # bitsandbytes' own default
        if kind not in {Quantization.NF4.value, Quantization.FP4.value}:
            raise ModelError(
                f"{name} is quantized with bitsandbytes to {kind!r}, neither nf4 nor fp4",
                hint=ORIGINAL,
            )
        storage = str(config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
        names = {dtype_name(dtype): word.value for word, dtype in STORAGE_DTYPES.items()}
        return {
            "method": Quantization(kind),
            "double_quant": bool(config.get("bnb_4bit_use_double_quant")),
            "quant_storage": names.get(storage, storage),
        }

    def constant_names(self, name: str) -> tuple[str, ...]:
        """Return the tensors of the constants and of the levels."""
        return (f"{name}.absmax", f"{name}.quant_map")

    def weight_of_constant(self, name: str) -> str | None:
        """Return the weight that the tensor `name` holds constants of."""
        match = CONSTANT.fullmatch(name)
        return match[1] if match else None

    def compute_as_asked(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        """Restore the weights of `model` in `dtype`, and multiply in `compute_dtype`."""
        for module in model.modules():
            if isinstance(module, bnb.Linear4bit):
                module.compute_dtype = compute_dtype
                module.weight.quant_state.dtype = dtype
            elif isinstance(module, Bnb4bitParametrization):
                module.quant_state.dtype = dtype
        model.config.quantization_config.bnb_4bit_compute_dtype = compute_dtype

    def check_savable(self, settings: QuantizationSettings) -> None:
        """Check nothing: codes and constants are as they are stored."""

    def store_on_meta(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        *,
        unquantized: Sequence[str],
        experts: Sequence[str],
        compute_dtype: torch.dtype,
    ) -> None:
        """Replace the linear layers and fused experts of `model` by packed codes with their constants."""
        config = self.config(settings, unquantized=unquantized, experts=experts, compute_dtype=compute_dtype)
        for layer in replace_layers(model, list(unquantized), config):
            assert isinstance(layer, bnb.Linear4bit)
            layer.weight, layer.quant_state = _packed(layer.weight.shape, settings, dtype, layer)
        for name in experts:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            packed, state = _packed(getattr(module, leaf).shape, settings, dtype, None)
            setattr(module, leaf, nn.Parameter(packed.data, requires_grad=False))
            register_parametrization(module, leaf, Bnb4bitParametrization(state), unsafe=True)
            _register_parametrization_hooks(module, leaf)

    def allocations(
        self, entry: WeightEntry, settings: QuantizationSettings, dtype: torch.dtype, num_pieces: int
    ) -> Iterator[Allocation]:
        """Yield what `blocks.quantize` takes on a GPU: for a weight as a whole, or expert by expert."""
        num_blocks = -(-entry.num_parameters // BLOCK_SIZE)
        weight = entry.num_parameters // num_pieces * dtype.itemsize
        is_nested = settings.double_quant
        yield Allocation(num_bytes=weight, part=WeightPart.WEIGHT, is_kept=False)
        yield Allocation(num_bytes=num_blocks * FLOAT_BYTES, part=WeightPart.CONSTANTS, is_kept=not is_nested)
        yield Allocation(num_bytes=entry.weight_bytes, part=WeightPart.CODES)
        yield Allocation(num_bytes=CODE_BYTES, part=WeightPart.CONSTANTS)
        if is_nested:
            num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
            for num_bytes in (OFFSET_BYTES, num_blocks, num_nested * FLOAT_BYTES, NESTED_CODE_BYTES):
                yield Allocation(num_bytes=num_bytes, part=WeightPart.CONSTANTS)

    def held(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """Yield the constants of a layer's weight, or of the fused weight that `module` restores."""
        states = (getattr(getattr(module, "weight", None), "quant_state", None), getattr(module, "quant_state", None))
        for state in states:
            if isinstance(state, QuantState):
                yield from _constants(state)

    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return `weight`, `(out, in)` or stacked, as every pass restores it."""
        return quantized([weight], weight.shape, _four_bit(settings)).dequantized()

    def is_divisible(self, num_weights: int) -> bool:
        """Whether no block spans two slices of `num_weights`."""
        return num_weights % BLOCK_SIZE == 0

    def stacked(self, slices: Iterable[torch.Tensor], shape: torch.Size, settings: QuantizationSettings) -> Quantized:
        """Return stacked experts of `shape` in 4 bit."""
        return quantized(slices, shape, _four_bit(settings))

    def restored(
        self, name: str, codes: torch.Tensor, constants: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the weight of `codes`."""
        stats = {key.removeprefix(f"{name}."): tensor for key, tensor in constants.items()}
        packed = bnb.Params4bit.from_prequantized(codes, stats, device=torch.device("cpu"))
        packed.quant_state.dtype = dtype
        return Quantized.of(packed.data, packed.quant_state).dequantized()


class Params4bit(bnb.Params4bit):  # type: ignore[misc] # bitsandbytes is untyped
    """Packed codes on the meta device. PEFT copies a layer to measure its weight for DoRA, and theirs can't be copied.

    PEFT knows quantized weights by the name of their class, so this one has the same.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> "Params4bit":
        return self  # there are no values that could change


def _packed(
    shape: torch.Size, settings: QuantizationSettings, dtype: torch.dtype, layer: nn.Module | None
) -> tuple[Params4bit, QuantState]:
    """Return a weight of `shape` on the meta device, and what it would be restored with."""
    codes, state = functional.quantize_4bit(
        torch.empty(shape, dtype=dtype, device=META),
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
        module=layer,
        bnb_quantized=True,
    )
    return weight, state


def _nest(state: QuantState) -> None:
    """Quantize the constants by hand: bitsandbytes would keep the levels on this device, and use them on any."""
    num_blocks = state.absmax.numel()
    state.nested = True
    state.offset = torch.empty((), dtype=torch.float32, device=META)
    state.absmax = torch.empty(num_blocks, dtype=torch.uint8, device=META)
    state.state2 = QuantState(
        absmax=torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32, device=META),
        blocksize=NESTED_BLOCK_SIZE,
        code=torch.empty(256, dtype=torch.float32, device=META),
        dtype=torch.float32,
    )


def _row_width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[-1]


def _stored(state: QuantState) -> StoredWeight:
    return StoredWeight(shape=state.shape, dtype=state.dtype, constants=tuple(_constants(state)))


def _constants(state: QuantState) -> Iterator[torch.Tensor]:
    yield state.absmax
    yield state.code
    if state.offset is not None:
        yield state.offset
    if state.state2 is not None:
        yield from _constants(state.state2)


def _four_bit(settings: QuantizationSettings) -> FourBit:
    return FourBit(
        quant_type=settings.method.value,
        double_quant=settings.double_quant,
        storage=STORAGE_DTYPES[settings.quant_storage],
    )


METHOD = FourBitMethod()
