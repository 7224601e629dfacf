"""What the methods of bitsandbytes have in common: their config, and their layers on the meta device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_cli.quantization.methods.skip_modules import linear_layers

BITSANDBYTES = "bitsandbytes"  # the quant_method of a checkpoint
KEPT = "llm_int8_skip_modules"  # the modules that stay in 16 bit, in 4 bit too


def is_stored_by(key: str, quant_method: str, config: Mapping[str, Any]) -> bool:
    """Whether the `quantization_config` of a checkpoint is of bitsandbytes, and sets the key of a method."""
    return quant_method == BITSANDBYTES and bool(config.get(key))


def replace_layers(model: PreTrainedModel, unquantized: list[str], config: BitsAndBytesConfig) -> list[nn.Module]:
    """Replace the linear layers of `model`, but for `unquantized`, by empty ones of bitsandbytes; return these.

    `model` is on the meta device, and says afterwards what PEFT and the trainer ask a quantized model for.
    """
    linears = dict(linear_layers(model))
    if set(linears) - set(unquantized):
        replace_with_bnb_linear(model, unquantized, config)
    replaced: list[nn.Module] = []
    for name, before in linears.items():
        layer = model.get_submodule(name)
        if layer is before:
            continue
        if before.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(before.bias), requires_grad=False)
        replaced.append(layer)
    for attribute, value in (("is_loaded_in_4bit", config.load_in_4bit), ("is_loaded_in_8bit", config.load_in_8bit)):
        setattr(model, attribute, value)
    model.config.quantization_config = config
    return replaced
