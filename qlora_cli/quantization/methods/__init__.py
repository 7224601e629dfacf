"""Quantization methods: one module each, looked up by the name in the settings."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module

import torch
from torch import nn

from qlora_cli.quantization.methods.method import Method, StoredWeight
from qlora_cli.settings.choices import METHODS, Quantization


def method_of(name: Quantization) -> Method:
    """Return the method of this name."""
    return _of_module(name.traits.module)


@cache
def _of_module(module: str) -> Method:
    method = import_module(f"{__name__}.{module}").METHOD
    assert isinstance(method, Method), f"{module} holds no method"
    return method


def all_methods() -> list[Method]:
    """Return every method once; a method may have several names."""
    return [_of_module(module) for module in dict.fromkeys(traits.module for traits in METHODS.values())]


def stored_weight(module: nn.Module, name: str, parameter: nn.Parameter) -> StoredWeight:
    """Return how `parameter` of `module`, read as the attribute `name`, is stored."""
    candidates = (method.stored(module, name, parameter) for method in all_methods())
    unquantized = StoredWeight(shape=parameter.shape, dtype=parameter.dtype, why_not="not asked for")
    return next((stored for stored in candidates if stored is not None), unquantized)


def is_quantized_layer(module: nn.Module) -> bool:
    """Return whether `module` replaces a linear layer, and multiplies with a quantized weight."""
    return any(isinstance(module, method.layer_types) for method in all_methods())


def restores_weight(module: nn.Module) -> bool:
    """Return whether `module` is a parametrization that dequantizes a weight whenever it is read."""
    return any(isinstance(module, method.parametrization_types) for method in all_methods())


def auxiliary_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors of `module` for dequantizing that are neither parameters nor buffers."""
    for method in all_methods():
        yield from method.auxiliary_tensors(module)


def held_weight(layer: nn.Module) -> torch.Tensor:
    """Return the weight of a layer in the shape of its products, dequantized if it is quantized."""
    found = (method.held_weight(layer) for method in all_methods())
    weight = next((weight for weight in found if weight is not None), layer.weight)
    assert isinstance(weight, torch.Tensor)
    return weight


def dora_problem(layer: nn.Module) -> str | None:
    """Return in words why DoRA can't train the magnitudes of `layer`; None if it can."""
    return next((reason for method in all_methods() if (reason := method.dora_problem(layer))), None)
