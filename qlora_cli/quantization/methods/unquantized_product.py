"""Products with weights in 16 or 32 bit to which an adapter's are added in place, as one operator of PyTorch."""

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from qlora_cli.quantization.methods.fused_product import FusedProduct
from qlora_cli.quantization.methods.method import Temporaries

OPERATOR = "qlora::linear_product"

torch.library.define(
    OPERATOR,
    "(Tensor rows, Tensor weight, Tensor? bias, Tensor low, Tensor b, float scale) -> Tensor",
)


@torch.library.impl(OPERATOR, "default")
def _compute(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    result = linear(rows, weight, bias)
    result.view(-1, result.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.t(), alpha=scale)
    return result


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]
def _fake(rows: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


def sum_temporaries(_: tuple[Any, ...], __: dict[str, Any]) -> Temporaries:
    """Return the temporaries of the product: none but cuBLAS's."""
    return Temporaries(uses_cublas=True)


class _Exactly(type):
    """The type of a class whose only instances are those of its base itself: a subclass may compute otherwise."""

    def __instancecheck__(cls, instance: object) -> bool:
        return type(instance) is cls.__bases__[0]


class PlainLinear(nn.Linear, metaclass=_Exactly):
    """Stands for `nn.Linear` without its subclasses, where layers are looked up by `isinstance`."""


class PlainConv1D(Conv1D, metaclass=_Exactly):
    """Stands for GPT-2's layer, which stores its weight as `(in, out)`, without its subclasses."""


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer of an adapter on a plain linear layer, made as PEFT makes it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config.fan_in_fan_out = False  # True of a model that has layers of GPT-2, too
        super().__init__(base_layer, adapter_name, config=config, **kwargs)


class LoraConv1D(Linear):  # type: ignore[misc]
    """PEFT's layer of an adapter on a layer of GPT-2, made as PEFT makes it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config.fan_in_fan_out = True
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=True, **kwargs)


class _UnquantizedProduct(FusedProduct):
    """Products with weights that are not quantized."""

    operator = OPERATOR
    dequantizes = False

    @abstractmethod
    def _weight(self, layer: Any) -> torch.Tensor:
        """Return the weight of `layer`, or a view of it, as `(out, in)`."""

    def compute_dtype(self, layer: Any) -> torch.dtype | None:
        """Return the weight's own."""
        dtype: torch.dtype = layer.weight.dtype
        return dtype

    def product(
        self, layer: Any, rows: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float, x_dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the product in the dtype of the weight, as under autocast."""
        bias = None if layer.bias is None else layer.bias.to(rows.dtype)
        result: torch.Tensor = torch.ops.qlora.linear_product.default(rows, self._weight(layer), bias, low, b, scale)
        return result

    def gradient(
        self, layer: Any, gradient: torch.Tensor, of_low: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the gradient of the rows; compiled code and a trace see each operation of it."""
        result: torch.Tensor = (gradient @ self._weight(layer)).to(dtype)
        return result.addmm_(of_low.to(dtype), a.to(dtype))


class LinearProduct(_UnquantizedProduct):
    """Products with the weights of linear layers."""

    layer_type = PlainLinear
    lora_type = LoraLinear

    def _weight(self, layer: Any) -> torch.Tensor:
        weight: torch.Tensor = layer.weight
        return weight


class Conv1DProduct(_UnquantizedProduct):
    """Products with the weights of GPT-2's layers."""

    layer_type = PlainConv1D
    lora_type = LoraConv1D

    def _weight(self, layer: Any) -> torch.Tensor:
        weight: torch.Tensor = layer.weight
        return weight.t()
