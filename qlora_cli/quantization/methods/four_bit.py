"""NF4 and FP4 (QLoRA, arXiv 2305.14314, section 3): two codes per byte, and a constant for each block of weights.

`blocks` quantizes them, `four_bit_quantizer` while a model is loaded, and `round_trip` restores them as in training.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from qlora_cli.quantization.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE, FourBitFormat
from qlora_cli.quantization.calibrated_blocks import WeightSlice, calibrate
from qlora_cli.quantization.calibrated_weights import CalibratedWeights
from qlora_cli.quantization.entries import WeightEntry, dtype_name
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.methods.bitsandbytes import SKIP_MODULES_KEY, is_stored_by, replace_layers
from qlora_cli.quantization.methods.four_bit_product import OPERATOR as FUSED
from qlora_cli.quantization.methods.four_bit_product import FourBitProduct, gemm_temporaries, sum_temporaries
from qlora_cli.quantization.methods.four_bit_quantizer import LOADER, QloraConfig, QloraQuantizer
from qlora_cli.quantization.methods.method import (
    META,
    ORIGINAL,
    Allocation,
    Method,
    Operator,
    Saving,
    StoredWeight,
    WeightPart,
)
from qlora_cli.quantization.methods.skip_modules import fused_experts, linear_layers
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.quantization.round_trip import Quantized, quantized
from qlora_cli.settings.choices import Quantization, Storage
from qlora_cli.settings.models import QuantizationSettings

STORAGE_DTYPES = {
    Storage.UINT8: torch.uint8,
    Storage.BF16: torch.bfloat16,
    Storage.FP16: torch.float16,
    Storage.FP32: torch.float32,
}
GEMM = "bitsandbytes::gemm_4bit"
STORED_KEY = "load_in_4bit"  # in the config of a checkpoint
CODE_BYTES = 16 * 4  # the 16 levels, one table per weight
NESTED_CODE_BYTES = 256 * 4  # the levels of the constants, likewise
OFFSET_BYTES = FLOAT_BYTES = 4
# What bitsandbytes stores with packed codes.
CONSTANT = re.compile(r"(.*)\.((nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+)")


class FourBitMethod(Method):
    """NF4 or FP4, by `settings.method`."""

    loader = LOADER
    skip_modules_key = SKIP_MODULES_KEY
    stored_key = STORED_KEY
    stores_experts = True
    is_calibratable = True
    layer_types = (bnb.Linear4bit,)
    parametrization_types = (Bnb4bitParametrization,)
    operators = MappingProxyType(
        {GEMM: Operator(temporaries=gemm_temporaries), FUSED: Operator(temporaries=sum_temporaries)}
    )
    products = frozenset((GEMM,))
    fused_products = (FourBitProduct(),)

    def describe(self, settings: QuantizationSettings) -> str:
        """Describe the kind of codes, and whether their constants are quantized, too."""
        return f"{super().describe(settings)}, {'double' if settings.double_quant else 'single'} quantization"

    def savings(self, settings: QuantizationSettings) -> Iterator[Saving]:
        """Yield double quantization (section 3), if it is off."""
        if not settings.double_quant:
            effect = "the weights' scales in 8 bit, their error stays nearly the same"
            yield Saving(key="double_quant", value=True, effect=effect)

    def unsupported_weights(self, model: PreTrainedModel, device: torch.device) -> Mapping[str, str]:
        """Return the linear layers and fused experts that bitsandbytes dequantizes wrongly on a CPU.

        Its AVX-512 kernel (0.50) uses the constants of the wrong blocks if a row does not end with a block. Such
        weights stay in 16 bit on every CPU, so that a run does not depend on the CPU.
        """
        if device.type != "cpu":
            return {}
        widths = {name: _row_width(module) for name, module in linear_layers(model)}
        widths |= {name: shape[-1] for name, shape in fused_experts(model)}
        return {
            name: f"rows of {width} weights, not a multiple of {BLOCK_SIZE}: bitsandbytes misreads them on a CPU"
            for name, width in widths.items()
            if width % BLOCK_SIZE
        }

    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return the bytes of a weight, by the closed form (section 3)."""
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
        """Return the bytes per weight of the constants in fp32, before they are quantized."""
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
        residuals: QuantizationResiduals | None = None,
        shards: KeptShards | None = None,
        calibrated: CalibratedWeights | None = None,
    ) -> QloraConfig:
        """Return the config for `QloraQuantizer` with every field set: transformers' default is FP4 in fp32."""
        return QloraConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.method.value,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=STORAGE_DTYPES[settings.quant_storage],
            llm_int8_skip_modules=list(unquantized),
            quantized_parameters=list(experts),
            measure_error=measure_error,
            residuals=residuals,
            shards=shards,
            calibrated=calibrated,
        )

    def calibrate(
        self, slices: Sequence[WeightSlice], shape: torch.Size, settings: QuantizationSettings
    ) -> tuple[torch.Tensor, QuantState]:
        """Return packed codes and the quantization state."""
        return calibrate(slices, shape, _four_bit(settings))

    def refused_weights(self, config: QuantizationConfigMixin) -> Mapping[str, ModelError]:
        """Return the errors of weights that were refused while a model was loaded with `config`, by full name."""
        assert isinstance(config, QloraConfig)
        return config.refused.errors

    def finalize(self, model: PreTrainedModel) -> None:
        """Prevent bitsandbytes from repacking the weights at the first evaluation on CPUs with AVX512-BF16.

        It would then compute with bf16 scales: another model than in training, and other bytes than those loaded.
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
        """Return `config` if it is of a 4-bit checkpoint; with quantized experts it names our own loader."""
        if quant_method == LOADER:  # the file omits the key, or transformers would use its own quantizer
            return {**config, STORED_KEY: True}
        return config if is_stored_by(STORED_KEY, quant_method, config) else None

    def stored_settings(self, config: Mapping[str, Any], name: str) -> dict[str, object]:
        """Return the kind of codes, their storage dtype, and whether their constants are quantized, too.

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
        """Return the names of the tensors of the constants and of the levels."""
        return (f"{name}.absmax", f"{name}.quant_map")

    def weight_of_constant(self, name: str) -> str | None:
        """Return the weight whose constants the tensor `name` holds."""
        match = CONSTANT.fullmatch(name)
        return match[1] if match else None

    def apply_compute_settings(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        """Dequantize the weights of `model` to `dtype`, and multiply in `compute_dtype`."""
        for module in model.modules():
            if isinstance(module, bnb.Linear4bit):
                module.compute_dtype = compute_dtype
                module.weight.quant_state.dtype = dtype
            elif isinstance(module, Bnb4bitParametrization):
                module.quant_state.dtype = dtype
        model.config.quantization_config.bnb_4bit_compute_dtype = compute_dtype

    def check_savable(self, settings: QuantizationSettings) -> None:
        """Check nothing: codes and constants are saved as they are."""

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
        """Yield the allocations of `blocks.quantize` on a GPU: for a weight as a whole, or expert by expert."""
        num_blocks = -(-entry.num_parameters // BLOCK_SIZE)
        weight = entry.num_parameters // num_pieces * dtype.itemsize
        is_nested = settings.double_quant
        yield Allocation(num_bytes=weight, part=WeightPart.WEIGHT, is_persistent=False)
        yield Allocation(num_bytes=num_blocks * FLOAT_BYTES, part=WeightPart.CONSTANTS, is_persistent=not is_nested)
        yield Allocation(num_bytes=entry.weight_bytes, part=WeightPart.CODES)
        yield Allocation(num_bytes=CODE_BYTES, part=WeightPart.CONSTANTS)
        if is_nested:
            num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
            for num_bytes in (OFFSET_BYTES, num_blocks, num_nested * FLOAT_BYTES, NESTED_CODE_BYTES):
                yield Allocation(num_bytes=num_bytes, part=WeightPart.CONSTANTS)

    def auxiliary_tensors(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """Yield the constants of a layer's weight, or of the fused weight that `module` dequantizes."""
        states = (getattr(getattr(module, "weight", None), "quant_state", None), getattr(module, "quant_state", None))
        for state in states:
            if isinstance(state, QuantState):
                yield from _constants(state)

    def held_weight(self, layer: nn.Module) -> torch.Tensor | None:
        """Return the weight of a 4-bit layer."""
        weight: Any = layer.weight
        if not isinstance(weight, bnb.Params4bit) or weight.quant_state is None:
            return None
        held: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return held

    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return `weight`, `(out, in)` or stacked, quantized and dequantized as in every pass."""
        return quantized([weight], weight.shape, _four_bit(settings)).dequantized()

    def is_divisible(self, num_weights: int) -> bool:
        """Return whether no block spans two slices of `num_weights`."""
        return num_weights % BLOCK_SIZE == 0

    def stacked(self, slices: Iterable[torch.Tensor], shape: torch.Size, settings: QuantizationSettings) -> Quantized:
        """Return stacked experts of `shape` in 4 bit."""
        return quantized(slices, shape, _four_bit(settings))

    def restored(
        self, name: str, codes: torch.Tensor, constants: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the dequantized weight."""
        stats = {key.removeprefix(f"{name}."): tensor for key, tensor in constants.items()}
        packed = bnb.Params4bit.from_prequantized(codes, stats, device=torch.device("cpu"))
        packed.quant_state.dtype = dtype
        return Quantized.of(packed.data, packed.quant_state).dequantized()


class Params4bit(bnb.Params4bit):  # type: ignore[misc] # bitsandbytes is untyped
    """Packed codes on the meta device that can be copied, unlike those of bitsandbytes: for DoRA, PEFT copies a layer.

    PEFT recognises quantized weights by the name of their class, so this one has the same.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> "Params4bit":
        return self  # there are no values that could change


def _packed(
    shape: torch.Size, settings: QuantizationSettings, dtype: torch.dtype, layer: nn.Module | None
) -> tuple[Params4bit, QuantState]:
    """Return a packed weight of `shape` on the meta device, and its quantization state."""
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
    """Quantize the constants by hand: bitsandbytes would cache the levels of the meta device for all devices."""
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


def _four_bit(settings: QuantizationSettings) -> FourBitFormat:
    return FourBitFormat(
        quant_type=settings.method.value,
        double_quant=settings.double_quant,
        storage=STORAGE_DTYPES[settings.quant_storage],
    )


METHOD = FourBitMethod()
