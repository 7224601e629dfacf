"""What the bitsandbytes methods share: their config, and their layers on the meta device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_cli.quantization.methods.skip_modules import linear_layers

BITSANDBYTES = "bitsandbytes"  # the quant_method of a checkpoint
SKIP_MODULES_KEY = "llm_int8_skip_modules"  # the modules that stay in 16 bit, for 4 bit, too


def is_stored_by(key: str, quant_method: str, config: Mapping[str, Any]) -> bool:
    """Return whether the `quantization_config` of a checkpoint is of bitsandbytes and sets the `key` of a method."""
    return quant_method == BITSANDBYTES and bool(config.get(key))


def replace_layers(model: PreTrainedModel, unquantized: list[str], config: BitsAndBytesConfig) -> list[nn.Module]:
    """Replace the linear layers of `model`, except `unquantized`, by empty ones of bitsandbytes; return these.

    `model` is on the meta device; it gets the attributes that PEFT and the trainer expect of a quantized model.
    """
    linears = dict(linear_layers(model))
    if set(linears) - set(unquantized):
        replace_with_bnb_linear(model, unquantized, config)
    replaced: list[nn.Module] = []
    for name, linear in linears.items():
        layer = model.get_submodule(name)
        if layer is linear:
            continue
        if linear.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(linear.bias), requires_grad=False)
        replaced.append(layer)
    for attribute, value in (("is_loaded_in_4bit", config.load_in_4bit), ("is_loaded_in_8bit", config.load_in_8bit)):
        setattr(model, attribute, value)
    model.config.quantization_config = config
    return replaced
