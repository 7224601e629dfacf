"""Models loaded by plain transformers and bitsandbytes, as references for those that we load."""

from collections.abc import Iterable
from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.loading.loader import LoadedModel

ROWS = 3136  # of an embedding: the bundled tokenizer has 3072 ids, and the class of Qwen2 adds one
IDS = torch.randint(3, 3000, (2, 24), generator=torch.Generator().manual_seed(0))


def load_plain(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model as transformers alone loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model


def quantized_whole(
    weight: torch.Tensor, quant_type: str = "nf4", *, double: bool = True
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a whole weight with bitsandbytes."""
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type=quant_type, compress_statistics=double
    )
    return packed, state


def round_trip_weights(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Quantize and dequantize each of these weights of `model` with bitsandbytes (nf4, double quantization)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            stored_as_in_out = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            weight = parameters[name].T if stored_as_in_out else parameters[name]
            weight.copy_(functional.dequantize_4bit(*quantized_whole(weight)))


def dequantized(checkpoint: Path, loaded: LoadedModel) -> PreTrainedModel:
    """Return the plain model, in which the weights that `loaded` has quantized are quantized and dequantized."""
    return dequantize(load_plain(checkpoint), loaded)


def dequantize(model: PreTrainedModel, loaded: LoadedModel) -> PreTrainedModel:
    """Quantize and dequantize those weights of a plain `model` that `loaded` has quantized, and return it.

    It computes attention as `loaded` does, so that results may be compared to the bit.
    """
    model.set_attn_implementation(str(loaded.base.config._attn_implementation))
    round_trip_weights(model, [entry.name for entry in loaded.inventory.entries if entry.is_quantized])
    return model
