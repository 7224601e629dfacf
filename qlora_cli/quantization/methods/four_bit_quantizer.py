"""4-bit quantization on loading, as a quantizer that is registered with transformers.

`from_pretrained` still handles shards, renamed weights, dtypes and tied weights. Unlike transformers' own
bitsandbytes quantizer, this one quantizes weights piece by piece in bounded memory, and fused experts too, each
expert as it is read.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from qlora_cli.errors import ModelError
from qlora_cli.quantization.blocks import BLOCK_SIZE, FourBitFormat, SquaredError, quantize
from qlora_cli.quantization.calibrated_weights import CalibratedWeights
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.refused_weights import OTHER_VERSION, RefusedWeights
from qlora_cli.quantization.residuals import QuantizationResiduals

LOADER = "qlora"
Errors = dict[str, float]


@register_quantization_config(LOADER)
class QloraConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig` for `QloraQuantizer`; `quantized_parameters` are fused experts, by full name.

    A checkpoint has it only if it holds quantized experts: plain transformers can't load those, and says so.
    """

    def __init__(
        self,
        *,
        quantized_parameters: list[str] | None = None,
        measure_error: bool = False,
        residuals: QuantizationResiduals | None = None,
        shards: KeptShards | None = None,
        calibrated: CalibratedWeights | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        kwargs["load_in_4bit"] = True
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.quant_method = LOADER  # type: ignore[assignment] # their enumeration is of their own methods
        self.quantized_parameters = quantized_parameters or []
        # Relative RMS errors by full name, filled in while loading. `from_pretrained` copies the config:
        # read them from the quantizer of the model.
        self.errors: Errors | None = {} if measure_error else None
        self.residuals = residuals  # filled in while loading, too
        self.shards = shards  # too
        self.calibrated = calibrated
        self.refused = RefusedWeights()

    @property
    def four_bit(self) -> FourBitFormat:
        """The format for `quantize`."""
        return FourBitFormat(
            quant_type=self.bnb_4bit_quant_type,
            double_quant=self.bnb_4bit_use_double_quant,
            storage=self.bnb_4bit_quant_storage,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content for a config.json."""
        content: dict[str, Any] = super().to_dict()
        # `load_in_4bit` would make transformers use its own quantizer, whatever quant_method says.
        for key in (
            "errors",
            "residuals",
            "shards",
            "calibrated",
            "refused",
            "load_in_4bit",
            "load_in_8bit",
            "_load_in_4bit",
            "_load_in_8bit",
        ):
            content.pop(key, None)
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content, whole: the defaults that transformers' own subtracts have none of our keys."""
        return self.to_dict()

    def plain(self) -> BitsAndBytesConfig:
        """Return the equivalent config for transformers' own quantizer."""
        content = self.to_dict()
        for key in ("quant_method", "quantized_parameters"):
            del content[key]
        return BitsAndBytesConfig(load_in_4bit=True, **content)


@register_quantizer(LOADER)
class QloraQuantizer(Bnb4BitHfQuantizer):
    """Quantizes linear layers and fused experts while they are read, or reads quantized ones."""

    quantization_config: QloraConfig

    @property
    def _experts(self) -> list[str]:
        return self.quantization_config.quantized_parameters

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing: the loader has done so, and the embedding may be in host memory."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether the weight `param_name` is stored in 4 bit."""
        return param_name in self._experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes one weight."""
        return _Quantize(self.quantization_config)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return the converters that assemble stored quantized weights."""
        if not self.pre_quantized:
            return []
        experts = {full.rpartition(".")[2] for full in self._experts} - {"weight"}
        # The first match wins: down_proj.weight.absmax, of a layer, must not match the experts' down_proj.
        names = ("weight", *sorted(experts))
        return [WeightConverter(_serialized(name), name, [_Deserialize(self)]) for name in names]

    def update_weight_conversions(
        self,
        weight_conversions: list[WeightConverter],
        model: PreTrainedModel | None = None,  # transformers passes it from 5.18 on
    ) -> list[WeightConverter]:
        """Replace converters that stack experts by ones that stream them one at a time."""
        return [self._streamed(conversion) for conversion in weight_conversions] + self.get_weight_conversions()

    def _streamed(self, conversion: WeightConverter) -> WeightConverter:
        if self.pre_quantized or not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
            return conversion
        first = conversion.operations[0]
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return conversion
        target = conversion._original_target_patterns[0].rpartition(".")[2]
        if not any(name.endswith(f".{target}") for name in self._experts):
            return conversion
        operation = _QuantizeExperts(self.quantization_config, conversion.operations)
        streaming = _Streaming(
            source_patterns=conversion._original_source_patterns,
            target_patterns=conversion._original_target_patterns,
            operations=[operation],
        )
        streaming.scope_prefix = conversion.scope_prefix
        streaming.base_model_prefix = conversion.base_model_prefix
        return streaming

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in self._experts:
            _dequantize_on_access(model, name)
        # What PEFT, TRL and the trainer expect of a quantized model.
        setattr(model, "quantization_method", QuantizationMethod.BITS_AND_BYTES)  # noqa: B010 - theirs, undeclared
        if not self._experts:
            model.config.quantization_config = self.quantization_config.plain()
        done: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return done


def _serialized(name: str) -> list[str]:
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    states = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
    return [*(f"{name}.{part}" for part in (*parts, *states)), name]


def _dequantize_on_access(model: PreTrainedModel, full_name: str) -> None:
    """Dequantize a fused weight whenever it is read, by a parametrization of bitsandbytes."""
    module, name = get_module_from_name(model, full_name)
    stored = getattr(module, name)
    if not isinstance(stored, Params4bit):
        return  # not in the checkpoint, which the loader refuses by name
    state = stored.quant_state
    setattr(module, name, nn.Parameter(stored.data, requires_grad=False))
    replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), stored.device)


class _Quantize(ConversionOps):
    """Quantizes one weight: of a linear layer, or the fused one of experts that are stored as one."""

    def __init__(self, config: QloraConfig) -> None:
        self._config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return `input_dict` with its weights quantized."""
        return {name: self._convert(kwargs["model"], name, value) for name, value in input_dict.items()}

    def _convert(self, model: PreTrainedModel, name: str, value: Any) -> Params4bit:
        with self._config.refused.recording(name):
            return self._quantized(model, name, value)

    def _quantized(self, model: PreTrainedModel, name: str, value: Any) -> Params4bit:
        weight = value[0] if isinstance(value, list) else value
        if isinstance(weight, Params4bit):  # experts, already quantized one by one
            return weight
        module, leaf = get_module_from_name(model, name)
        if isinstance(module, Linear4bit) and issubclass(module.source_cls, Conv1D):
            weight = weight.T.contiguous()  # stored as (in, out)
        _check_shape(weight.shape, getattr(module, leaf).shape)
        stored = _quantized(self._config, name, [weight], weight.shape, module)
        residuals = self._config.residuals
        if residuals is not None and name in residuals.ranks:
            restored = functional.dequantize_4bit(stored.data, stored.quant_state)
            residuals.add(name, weight.float() - restored.float())
        return stored


class _QuantizeExperts(ConversionOps):
    """Quantizes the experts of a layer as they are read, one at a time; `operations` would stack them.

    Those that are to stay unquantized, as in single layers, are stacked.
    """

    def __init__(self, config: QloraConfig, operations: list[ConversionOps]) -> None:
        self._config = config
        self._operations = operations

    def __deepcopy__(self, memo: dict[int, Any]) -> "_QuantizeExperts":
        return self  # transformers copies a converter for every weight; all write errors to the same config

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the weight of all experts, by its full name; `input_dict` holds functions that read tensors."""
        full_layer_name: str = kwargs["full_layer_name"]
        module, name = get_module_from_name(kwargs["model"], full_layer_name)
        shape = getattr(module, name).shape
        num_experts = {len(readers) for readers in input_dict.values()}

        def stacked(index: slice) -> torch.Tensor:
            tensors: Any = {source: [read() for read in readers[index]] for source, readers in input_dict.items()}
            for operation in self._operations:
                tensors = operation.convert(tensors, source_patterns, target_patterns, **kwargs)
            (value,) = tensors.values()
            tensor: torch.Tensor = value[0] if isinstance(value, list) else value
            _check_shape(tensor.shape[1:], shape[1:])
            return tensor

        def experts() -> Iterator[torch.Tensor]:
            if shape[1:].numel() % BLOCK_SIZE:  # a block would span two experts
                yield stacked(slice(None))
                return
            for index in range(shape[0]):
                yield stacked(slice(index, index + 1))

        with self._config.refused.recording(full_layer_name):
            _check_number(num_experts, shape[0])
            if full_layer_name not in self._config.quantized_parameters:
                return {full_layer_name: stacked(slice(None))}
            return {full_layer_name: _quantized(self._config, full_layer_name, experts(), shape, module)}


def _check_number(stored: set[int], expected: int) -> None:
    if stored != {expected}:
        numbers = ", ".join(map(str, sorted(stored)))
        raise ModelError(f"its files hold {numbers} experts, and config.json says {expected}", hint=OTHER_VERSION)


def _check_shape(stored: torch.Size, expected: torch.Size) -> None:
    if stored != expected:  # a wrong shape with as many weights would be quantized and used
        raise ModelError(
            f"its files hold the shape {tuple(stored)}, and config.json says {tuple(expected)}", hint=OTHER_VERSION
        )


class _Streaming(WeightConverter):
    """A converter that passes on functions to read its tensors, so that an operation decides when to read each."""

    def materialize_tensors(self) -> dict[str, Any]:
        """Return the reading functions by source pattern, and release them."""
        return {source: self.collected_tensors.pop(source) for source in list(self.collected_tensors)}


class _Deserialize(ConversionOps):
    """Assembles a weight from its stored codes and constants."""

    def __init__(self, hf_quantizer: QloraQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the quantized weight, or an unquantized one unchanged."""
        if len(input_dict) == 1:
            return input_dict
        module, _ = get_module_from_name(kwargs["model"], kwargs["full_layer_name"])
        stored = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        key = min(stored, key=len)  # the others add a suffix to it
        weight = stored.pop(key)
        stats = {name.removeprefix(f"{key}."): value for name, value in stored.items()}
        linear = module if isinstance(module, Linear4bit) else None
        shards = self.hf_quantizer.quantization_config.shards
        if shards is None:
            return {key: Params4bit.from_prequantized(weight, stats, device=weight.device, module=linear)}
        whole = Params4bit.from_prequantized(weight, stats, device=shards.device, module=linear)
        whole.data = shards.keep(kwargs["full_layer_name"], whole.data)
        return {key: whole}


def _on_device(pieces: Iterable[torch.Tensor], shards: KeptShards | None) -> Iterator[torch.Tensor]:
    """Yield the pieces of a weight where they are quantized: where its shard is kept, or where they were read to."""
    return (piece if shards is None else piece.to(shards.device) for piece in pieces)


def _quantized(config: QloraConfig, name: str, pieces: Any, shape: torch.Size, module: nn.Module) -> Params4bit:
    error = SquaredError() if config.errors is not None else None
    shards = config.shards
    if config.calibrated is not None and name in config.calibrated:
        packed, state = _calibrated(config.calibrated, name, _on_device(pieces, shards), error)
    else:
        packed, state = quantize(_on_device(pieces, shards), shape, config.four_bit, error)
    if error is not None and config.errors is not None:
        config.errors[name] = error.relative_rms
    linear = module if isinstance(module, Linear4bit) else None
    if linear is not None:
        linear.quant_state = state
        linear._is_hf_initialized = True
    return Params4bit(
        packed if shards is None else shards.keep(name, packed),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        module=linear,
        bnb_quantized=True,
    )


def _calibrated(
    calibrated: CalibratedWeights, name: str, pieces: Iterable[torch.Tensor], error: SquaredError | None
) -> tuple[torch.Tensor, QuantState]:
    """Return the calibrated codes of a weight given in pieces, which are read only as far as they are needed."""
    rest = iter(pieces)
    first = next(rest)
    packed, state = calibrated.take(name, first.device)
    if error is not None:
        restored = functional.dequantize_4bit(packed, state).view(-1)
        for piece in chain([first], rest):
            part, restored = restored[: piece.numel()], restored[piece.numel() :]
            error.add(piece.reshape(-1), part)
    return packed, state
