"""LoRA on fused experts that are stored in 4 bit: PEFT's wrapper of a parameter, with one method mended."""

from typing import Any

from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from peft import LoraConfig
from peft.tuners.lora import layer
from torch import nn


class ParamWrapper(layer.ParamWrapper):  # type: ignore[misc]
    """Adds its update to a weight that a parametrization dequantizes, for the length of one forward pass.

    PEFT 0.21 adds the update as a second parametrization, and then fails to take it away again if the weight has
    another one (it looks for a class that it no longer uses for experts): every step would add one more. PEFT
    knows its wrappers by the name of their class, so this one has the same.
    """

    def _remove_parametrizations(self) -> None:
        parametrizations = self.get_base_layer().parametrizations[self.parameter_name]
        assert not isinstance(parametrizations[-1], Bnb4bitParametrization), "nothing was added"
        del parametrizations[-1]


def use_for_quantized_experts(config: LoraConfig, model: nn.Module) -> None:
    """Make `config` wrap the quantized experts of `model` so, by the door PEFT has for layers of others."""
    wrapped: dict[type[nn.Module], Any] = {
        # A parametrized module has a class of its own, made from its original one.
        type(module).__bases__[0]: ParamWrapper
        for module in model.modules()
        if any(
            isinstance(parametrization, Bnb4bitParametrization)
            for chain in getattr(module, "parametrizations", {}).values()
            for parametrization in chain
        )
    }
    if wrapped:
        config._register_custom_module(wrapped)
        # Among what holds a fused weight is a module of its name, which may be that of a linear layer: down_proj.
        config.exclude_modules = r".*\.parametrizations\..*"
