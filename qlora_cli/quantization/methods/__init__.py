"""How weights are stored: a module a method, found by the name that settings give it."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module

import torch
from torch import nn

from qlora_cli.quantization.methods.method import Method, StoredWeight
from qlora_cli.settings.choices import METHODS, Quantization


def method_of(name: Quantization) -> Method:
    """Return the method that settings name."""
    return _of_module(name.traits.module)


@cache
def _of_module(module: str) -> Method:
    method = import_module(f"{__name__}.{module}").METHOD
    assert isinstance(method, Method), f"{module} holds no method"
    return method


def all_methods() -> list[Method]:
    """Return every method once; one may have several names."""
    return [_of_module(module) for module in dict.fromkeys(traits.module for traits in METHODS.values())]


def stored_weight(module: nn.Module, name: str, parameter: nn.Parameter) -> StoredWeight:
    """Return how `parameter` of `module`, read as the attribute `name`, is stored."""
    found = (method.stored(module, name, parameter) for method in all_methods())
    as_it_is = StoredWeight(shape=parameter.shape, dtype=parameter.dtype, why_not="not asked for")
    return next((stored for stored in found if stored is not None), as_it_is)


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether `module` stands in the place of a linear layer, and multiplies with a quantized weight."""
    return any(isinstance(module, method.layer_types) for method in all_methods())


def restores_weight(module: nn.Module) -> bool:
    """Whether `module` is a parametrization that restores a quantized weight whenever it is read."""
    return any(isinstance(module, method.parametrization_types) for method in all_methods())


def held_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors, besides parameters and buffers, that `module` restores weights with."""
    for method in all_methods():
        yield from method.held(module)


def why_no_dora(layer: nn.Module) -> str | None:
    """Return in words why the magnitudes of `layer` can't be trained; None if they can."""
    return next((reason for method in all_methods() if (reason := method.why_no_dora(layer))), None)
