"""LLM.int8() on loading, row by row: the bits that bitsandbytes gives, in bounded memory.

transformers' own quantizer holds two 16-bit copies of a weight on a GPU and several fp32 ones on a CPU, and refuses an
embedding in host memory. Rows are quantized independently of one another (arXiv 2208.07339, section 2), so a weight
can be quantized in pieces of whole rows.
"""

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from qlora_cli.quantization.blocks import PIECE_SIZE

INT8_METHOD = "qlora_int8"


@register_quantization_config(INT8_METHOD)
class Int8Config(BitsAndBytesConfig):
    """`BitsAndBytesConfig` for `Int8Quantizer`; no checkpoint carries it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "load_in_8bit": True})  # type: ignore[no-untyped-call]
        self.quant_method = INT8_METHOD  # type: ignore[assignment] # their enumeration is of their own methods

    def plain(self) -> BitsAndBytesConfig:
        """Return the same as transformers' own quantizer takes it."""
        content = {key: value for key, value in self.to_dict().items() if not key.startswith(("quant_method", "_"))}
        return BitsAndBytesConfig(**content)


@register_quantizer(INT8_METHOD)
class Int8Quantizer(Bnb8BitHfQuantizer):
    """Quantizes linear layers while they are read, or reads them quantized."""

    quantization_config: Int8Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing: the loader has, and the embedding may lie in host memory."""

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes one weight."""
        return _QuantizeRows()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # What PEFT, TRL and the trainer ask a quantized model for.
        setattr(model, "quantization_method", QuantizationMethod.BITS_AND_BYTES)  # noqa: B010 - theirs, undeclared
        model.config.quantization_config = self.quantization_config.plain()
        done: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return done


class _QuantizeRows(ConversionOps):
    """Quantizes one weight of a linear layer."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002 - the signature is that of transformers
        target_patterns: list[str],  # noqa: ARG002
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return `input_dict` with its weights quantized."""
        return {name: _convert(kwargs["model"], name, value) for name, value in input_dict.items()}


def _convert(model: PreTrainedModel, name: str, value: Any) -> Int8Params:
    weight = value[0] if isinstance(value, list) else value
    module, _ = get_module_from_name(model, name)
    if issubclass(module.source_cls, Conv1D):
        weight = weight.T  # stored as (in, out)
    if module.weight.has_fp16_weights:
        return Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=True)
    codes, scales = quantize_rows(weight)
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `weight`, `(out, in)` in int8, and the largest magnitude of each row, `(out,)` in fp32."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    num_rows = max(1, PIECE_SIZE // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        # bitsandbytes quantizes from fp16, whatever the weight comes in.
        codes[rows], scales[rows], _ = functional.int8_vectorwise_quant(weight[rows].to(torch.float16).contiguous())
    return codes, scales
