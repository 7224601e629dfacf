"""LLM.int8() (arXiv 2208.07339): 8-bit codes and a scale for each row, loaded in bounded memory.

transformers' own quantizer holds two 16-bit copies of a weight on a GPU and several fp32 ones on a CPU, and refuses an
embedding in host memory. Rows are quantized independently of one another (section 2), so a weight can be quantized in
pieces of whole rows, to the same bits as by bitsandbytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from qlora_cli.errors import HardwareError, ModelError
from qlora_cli.model_files.finite import is_finite, not_finite
from qlora_cli.quantization.blocks import PIECE_SIZE
from qlora_cli.quantization.entries import WeightEntry, dtype_name
from qlora_cli.quantization.methods.bitsandbytes import SKIP_MODULES_KEY, is_stored_by, replace_layers
from qlora_cli.quantization.methods.method import (
    META,
    Allocation,
    Method,
    Operator,
    StoredWeight,
    Temporaries,
    WeightPart,
    nothing_quantized,
)
from qlora_cli.quantization.refused_weights import RefusedWeights
from qlora_cli.settings.choices import DEFAULT_METHOD, Quantization, quant_flag
from qlora_cli.settings.models import QuantizationSettings

LOADER = "qlora_int8"
STORED_KEY = "load_in_8bit"  # in the config of a checkpoint
SCALES = "SCB"  # as bitsandbytes names them
OUTLIER_SHARE = 0.001  # the share of a layer's features that are multiplied in 16 bit (section 3.2)
IN_EVERY_PRODUCT = "quantized in every product (int8_has_fp16_weight)"


@register_quantization_config(LOADER)
class Int8Config(BitsAndBytesConfig):
    """`BitsAndBytesConfig` for `Int8Quantizer`; no checkpoint has it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "load_in_8bit": True})  # type: ignore[no-untyped-call]
        self.quant_method = LOADER  # type: ignore[assignment] # their enumeration is of their own methods
        self.refused = RefusedWeights()

    def to_dict(self) -> dict[str, Any]:
        """Return the content for a config.json."""
        return {key: value for key, value in super().to_dict().items() if key != "refused"}

    def plain(self) -> BitsAndBytesConfig:
        """Return the equivalent config for transformers' own quantizer."""
        content = {key: value for key, value in self.to_dict().items() if not key.startswith(("quant_method", "_"))}
        return BitsAndBytesConfig(**content)


@register_quantizer(LOADER)
class Int8Quantizer(Bnb8BitHfQuantizer):
    """Quantizes linear layers while they are read, or reads quantized ones."""

    quantization_config: Int8Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing: the loader has done so, and the embedding may be in host memory."""

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes one weight."""
        return _QuantizeRows(self.quantization_config.refused)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # What PEFT, TRL and the trainer expect of a quantized model.
        setattr(model, "quantization_method", QuantizationMethod.BITS_AND_BYTES)  # noqa: B010 - theirs, undeclared
        model.config.quantization_config = self.quantization_config.plain()
        done: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return done


class _QuantizeRows(ConversionOps):
    """Quantizes one weight of a linear layer."""

    def __init__(self, refused: RefusedWeights) -> None:
        self._refused = refused

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return `input_dict` with its weights quantized."""
        return {name: self._convert(kwargs["model"], name, value) for name, value in input_dict.items()}

    def _convert(self, model: PreTrainedModel, name: str, value: Any) -> Int8Params:
        with self._refused.recording(name):
            return _quantized(model, name, value)


def _quantized(model: PreTrainedModel, name: str, value: Any) -> Int8Params:
    weight = value[0] if isinstance(value, list) else value
    module, _ = get_module_from_name(model, name)
    if issubclass(module.source_cls, Conv1D):
        weight = weight.T  # stored as (in, out)
    if module.weight.has_fp16_weights:
        return Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=True)
    codes, scales = quantize_rows(weight)
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `weight`, `(out, in)` in int8, and the largest magnitude of each row, `(out,)` in fp32.

    Raises:
        ModelError: it holds NaN or infinite values, or values beyond the range of fp16.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    num_rows = max(1, PIECE_SIZE // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        # bitsandbytes quantizes from fp16, whatever the dtype of the weight.
        values = weight[rows].to(torch.float16).contiguous()
        if not is_finite(values):
            raise _out_of_range(weight[rows])
        codes[rows], scales[rows], _ = functional.int8_vectorwise_quant(values)
    return codes, scales


def _out_of_range(weight: torch.Tensor) -> ModelError:
    if not is_finite(weight):
        return not_finite("holds ", weight.dtype)
    return ModelError(
        f"holds values up to {float(weight.abs().max()):.3g}, which overflow fp16, from which int8 is quantized",
        hint=f"Use {quant_flag([DEFAULT_METHOD])}, or leave the layer unquantized with quantization.skip_modules.",
    )


def _threshold(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return float(args[1] if len(args) > 1 else kwargs.get("threshold", 0.0))


def _quant_temporaries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Temporaries:
    # bitsandbytes/backends/cuda/ops.py: `A.abs() >= threshold` to find outliers.
    activations = args[0]
    return Temporaries(before=(activations.nbytes, activations.numel()) if _threshold(args, kwargs) else ())


def _quant_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _threshold(args, kwargs):
        return func(*args, **kwargs)
    activations = args[0]
    codes, scales, _ = func(activations)
    num_outliers = max(1, round(OUTLIER_SHARE * activations.shape[-1]))
    return codes, scales, activations.new_empty(num_outliers, dtype=torch.int64)


def _product_temporaries(args: tuple[Any, ...], _: dict[str, Any]) -> Temporaries:
    # int8_scaled_mm: the product in int32, and its dequantized values in fp16, before the outliers are added.
    rows, columns = args[0].shape[0], args[2].shape[0]
    return Temporaries(before=(rows * columns * 4,), after=(rows * columns * 2,))


def _product_on_meta(_: Any, args: tuple[Any, ...], __: dict[str, Any]) -> Any:
    activations, weight, outliers = args[0], args[2], args[5]
    rows = activations.shape[:-1]
    return activations.new_empty(*rows, weight.shape[0]), activations.new_empty(*rows, outliers.numel())


class Int8(Method):
    """LLM.int8(); with `int8_has_fp16_weight` weights are stored unquantized, and quantized in every product."""

    loader = LOADER
    skip_modules_key = SKIP_MODULES_KEY
    stored_key = STORED_KEY
    layer_types = (Linear8bitLt,)
    operators = MappingProxyType(
        {
            "bitsandbytes::int8_vectorwise_quant": Operator(temporaries=_quant_temporaries, on_meta=_quant_on_meta),
            "bitsandbytes::int8_mixed_scaled_mm": Operator(temporaries=_product_temporaries, on_meta=_product_on_meta),
        }
    )
    products = frozenset(("bitsandbytes::int8_scaled_mm", "bitsandbytes::int8_mixed_scaled_mm"))

    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return the bytes of a weight, `(out, in)`: one per element, and a scale in fp32 for each row."""
        is_unquantized = settings.int8_has_fp16_weight
        return WeightEntry(
            name=name,
            kind=kind,
            why_not=IN_EVERY_PRODUCT if is_unquantized else None,
            num_parameters=shape.numel(),
            weight_bytes=shape.numel() * (dtype.itemsize if is_unquantized else 1),
            constant_bytes=0 if is_unquantized else 4 * shape[0],
            dtype=dtype_name(dtype if is_unquantized else torch.int8),
        )

    def stored(self, module: nn.Module, name: str, parameter: nn.Parameter) -> StoredWeight | None:
        """Return how `parameter` is stored, if it is the weight of an 8-bit layer."""
        if not isinstance(parameter, Int8Params):
            return None
        if parameter.dtype != torch.int8:
            return StoredWeight(shape=parameter.shape, dtype=parameter.dtype, why_not=IN_EVERY_PRODUCT)
        assert isinstance(module, Linear8bitLt)
        # The scales move from the weight to the layer's state at the first product.
        scales = parameter.SCB if parameter.SCB is not None else module.state.SCB
        return StoredWeight(shape=parameter.shape, dtype=torch.float16, constants=(scales,))

    def config(
        self,
        settings: QuantizationSettings,
        *,
        unquantized: Sequence[str],
        **_: Any,
    ) -> Int8Config:
        """Return the config for `Int8Quantizer`."""
        return Int8Config(
            llm_int8_threshold=settings.int8_threshold,
            llm_int8_skip_modules=list(unquantized),
            llm_int8_has_fp16_weight=settings.int8_has_fp16_weight,
            llm_int8_enable_fp32_cpu_offload=settings.int8_cpu_offload,
        )

    def refused_weights(self, config: QuantizationConfigMixin) -> Mapping[str, ModelError]:
        """Return the errors of weights that were refused while a model was loaded with `config`, by full name."""
        assert isinstance(config, Int8Config)
        return config.refused.errors

    def offloads_to_cpu(self, settings: QuantizationSettings) -> bool:
        """Return whether weights that do not fit on the GPU stay on the CPU."""
        return settings.int8_cpu_offload

    def check_placement(
        self, settings: QuantizationSettings, device: torch.device, *, offloads_embedding: bool
    ) -> None:
        """Check that there is a GPU to offload from, and that no other setting decides what stays on the CPU.

        Raises:
            HardwareError: there is no GPU.
            ModelError: `offload_embedding` is set, too.
        """
        if settings.int8_cpu_offload and device.type != "cuda":
            raise HardwareError(
                f"has no effect: the model is on {device} as a whole",
                hint="Leave it out.",
                setting="quantization.int8_cpu_offload",
            )
        if settings.int8_cpu_offload and offloads_embedding:
            raise ModelError(
                "can't be used with quantization.int8_cpu_offload, which decides by itself what stays on the CPU",
                hint="Leave one of them out.",
                setting="model.offload_embedding",
            )

    def check_trainable(self, settings: QuantizationSettings) -> None:
        """Check that the whole model is on the GPU.

        Raises:
            HardwareError: it may not be.
        """
        if settings.int8_cpu_offload:
            raise HardwareError(
                "a model that is partly on the CPU (quantization.int8_cpu_offload) can be loaded, but not trained",
                hint=f"Leave it out, and use {quant_flag([DEFAULT_METHOD])} if the model does not fit.",
            )

    def claim(self, quant_method: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return `config` if it is of an 8-bit checkpoint."""
        return config if is_stored_by(STORED_KEY, quant_method, config) else None

    def stored_settings(self, config: Mapping[str, Any], name: str) -> dict[str, object]:
        """Return the settings that the weights fix; the checkpoint holds no 16-bit weights."""
        return {"method": Quantization.INT8, "int8_has_fp16_weight": False}

    def free_settings(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return the threshold that the checkpoint was saved with."""
        return {"int8_threshold": config["llm_int8_threshold"]} if "llm_int8_threshold" in config else {}

    def constant_names(self, name: str) -> tuple[str, ...]:
        """Return the name of the tensor of the scales."""
        return (f"{name.removesuffix('weight')}{SCALES}",)

    def weight_of_constant(self, name: str) -> str | None:
        """Return the weight whose scales, or whose order of codes, the tensor `name` holds."""
        suffix = next((suffix for suffix in (SCALES, "weight_format") if name.endswith(f".{suffix}")), None)
        return None if suffix is None else f"{name.removesuffix(suffix)}weight"

    def apply_compute_settings(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        """Set the threshold of `settings` in the layers of `model`."""
        for module in model.modules():
            if isinstance(module, Linear8bitLt):
                module.state.threshold = settings.int8_threshold
        model.config.quantization_config.llm_int8_threshold = settings.int8_threshold

    def check_savable(self, settings: QuantizationSettings) -> None:
        """Check that the weights are quantized, and all on one device.

        Raises:
            ModelError: they are not.
        """
        if settings.int8_has_fp16_weight:
            raise nothing_quantized()
        if settings.int8_cpu_offload:
            raise ModelError("a model that is partly on the CPU can't be saved", hint="Leave int8_cpu_offload out.")

    def extra_state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return the scales that have not yet moved to the state of a layer."""
        return {
            f"{name.removesuffix('weight')}{SCALES}": parameter.SCB
            for name, parameter in model.named_parameters()
            if isinstance(parameter, Int8Params) and parameter.SCB is not None
        }

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
        """Replace the linear layers of `model` by 8-bit ones."""
        assert not experts, "planned without"
        config = self.config(settings, unquantized=unquantized)
        for layer in replace_layers(model, list(unquantized), config):
            shape = layer.weight.shape
            assert isinstance(shape, torch.Size)
            if settings.int8_has_fp16_weight:
                weight = torch.empty(shape, dtype=dtype, device=META)
                layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=True)
                continue
            codes = torch.empty(shape, dtype=torch.int8, device=META)
            scales = torch.empty(shape[0], dtype=torch.float32, device=META)
            layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)

    def allocations(
        self,
        entry: WeightEntry,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        num_pieces: int,
    ) -> Iterator[Allocation]:
        """Yield the weight, its codes and their scales."""
        yield Allocation(num_bytes=entry.num_parameters * dtype.itemsize, part=WeightPart.WEIGHT, is_persistent=False)
        yield Allocation(num_bytes=entry.weight_bytes, part=WeightPart.CODES)
        yield Allocation(num_bytes=entry.constant_bytes, part=WeightPart.CONSTANTS)

    def auxiliary_tensors(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """Yield the codes and scales of a layer's weight."""
        if isinstance(weight := getattr(module, "weight", None), Int8Params):
            yield from (tensor for tensor in (weight.CB, weight.SCB) if tensor is not None)

    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return `weight`, `(out, in)`, quantized and dequantized."""
        codes, scales = quantize_rows(weight)
        return _dequantized(codes, scales, weight.dtype)

    def restored(
        self, name: str, codes: torch.Tensor, constants: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the dequantized weight, `(out, in)`."""
        (scales,) = (tensor for name, tensor in constants.items() if name.endswith(f".{SCALES}"))
        return _dequantized(codes, scales, dtype)

    def held_weight(self, layer: nn.Module) -> torch.Tensor | None:
        """Return the weight of an 8-bit layer. PEFT's function for it separates the weight from its scales."""
        weight = layer.weight
        if not isinstance(weight, Int8Params) or weight.dtype != torch.int8:
            return None
        assert isinstance(layer, Linear8bitLt)
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return _dequantized(weight.data, scales, torch.float32)

    def dora_problem(self, layer: nn.Module) -> str | None:
        """Return why PEFT can't compute the norm of the weight of `layer`: the scales are lost on the first pass."""
        if isinstance(layer, Linear8bitLt) and (layer.weight.device.type == "cpu" or layer.state.has_fp16_weights):
            where = "keeps 16-bit weights" if layer.state.has_fp16_weights else "is on a CPU"
            return f"an 8-bit base that {where}: PEFT does not restore its weights there"
        return None


def _dequantized(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
    return weight.to(dtype)


METHOD = Int8()
