"""Count a model's parameters and bytes by kind, exactly, from the tensors it holds."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Parameters and bytes by kind. Tied parameters count once."""

    num_parameters: int
    num_quantized_parameters: int
    quantized_weight_bytes: int
    quantization_constant_bytes: int
    unquantized_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything the model holds."""
        return self.quantized_weight_bytes + self.quantization_constant_bytes + self.unquantized_bytes

    @property
    def float32_bytes(self) -> int:
        """What the parameters would take in fp32."""
        return 4 * self.num_parameters

    @property
    def float16_bytes(self) -> int:
        """What the parameters would take in 16 bit."""
        return 2 * self.num_parameters


def take_inventory(model: nn.Module) -> Inventory:
    """Return the inventory of `model`, whose linear layers may be quantized by bitsandbytes."""
    num_parameters = num_quantized = packed = constants = unquantized = 0
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            num_weights = parameter.quant_state.shape.numel()
            num_parameters += num_weights
            num_quantized += num_weights
            packed += parameter.nbytes
        else:
            num_parameters += parameter.numel()
            unquantized += parameter.nbytes
    seen: set[int] = set()  # code tables may be shared between layers
    for tensor in _constants(model):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            constants += tensor.nbytes
    unquantized += sum(buffer.nbytes for buffer in model.buffers())
    return Inventory(
        num_parameters=num_parameters,
        num_quantized_parameters=num_quantized,
        quantized_weight_bytes=packed,
        quantization_constant_bytes=constants,
        unquantized_bytes=unquantized,
    )


def _constants(model: nn.Module) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while isinstance(state, QuantState):
            yield state.absmax
            yield state.code
            if state.offset is not None:
                yield state.offset
            state = state.state2
