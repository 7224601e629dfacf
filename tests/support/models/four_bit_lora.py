"""A layer, in 4 bit or not, with an adapter, its passes, exact ones, and the operations that it takes."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.fused_lora import fused_types

FUSED, GEMM, DEQUANTIZE = "qlora::four_bit_product", "bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit"
WIDTH_IN, WIDTH_OUT, RANK = 128, 192, 8
UNQUANTIZED = ("none", "conv1d")


class CountOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


class NewStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the storages that operations allocate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if result.untyped_storage().data_ptr() not in given:
            self._storages.append(weakref.ref(result.untyped_storage()))
        return result

    @property
    def num_seen(self) -> int:
        """How many were allocated."""
        return len(self._storages)

    @property
    def num_alive(self) -> int:
        """How many of them are still held."""
        return sum(storage() is not None for storage in self._storages)


def one_layer(
    dtype: torch.dtype = torch.float32,
    *,
    quant_type: str = "nf4",
    nested: bool = True,
    has_bias: bool = False,
    storage: torch.dtype = torch.uint8,
    **config: Any,
) -> Any:
    """Return a 4-bit layer, or a plain one for `none` and `conv1d`, with an adapter whose matrices are not zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH_OUT, WIDTH_IN, generator=generator) / WIDTH_IN**0.5
    layer: nn.Module
    if quant_type == "conv1d":
        layer = Conv1D(WIDTH_OUT, WIDTH_IN).to(dtype)
        layer.weight = nn.Parameter(weight.t().contiguous().to(dtype), requires_grad=False)
        has_bias = True
    elif quant_type == "none":
        layer = nn.Linear(WIDTH_IN, WIDTH_OUT, bias=has_bias, dtype=dtype)
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    else:
        layer = _four_bit(weight.to(dtype), quant_type=quant_type, nested=nested, has_bias=has_bias, storage=storage)
    if has_bias:
        layer.bias = nn.Parameter(torch.randn(WIDTH_OUT, generator=generator), requires_grad=False)
    owner: Any = nn.ModuleDict({"layer": layer.to("cpu")})
    owner.is_loaded_in_4bit = quant_type not in UNQUANTIZED
    settings = {"r": RANK, "lora_alpha": 24, "target_modules": ["layer"], **config}
    lora = LoraConfig(**settings)
    lora._register_custom_module(fused_types())
    inject_adapter_in_model(lora, owner)
    adapted = owner["layer"]
    for parameters in (adapted.lora_A, adapted.lora_B):
        weight = parameters["default"].weight
        weight.data = torch.randn(weight.shape, generator=generator) / 10
    return adapted.train()


def _four_bit(
    weight: torch.Tensor, *, quant_type: str, nested: bool, has_bias: bool, storage: torch.dtype
) -> nn.Linear:
    layer = bnb.nn.Linear4bit(
        WIDTH_IN,
        WIDTH_OUT,
        bias=has_bias,
        compute_dtype=weight.dtype,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    return layer  # type: ignore[no-any-return]


def rows_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows that a gradient is computed for."""
    rows = torch.randn(*shape, WIDTH_IN, generator=torch.Generator().manual_seed(1))
    return rows.to(dtype).requires_grad_()


def passes(layer: Any, rows: torch.Tensor, *, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the result and the gradients of a forward and a backward pass."""
    layer.zero_grad()
    rows.grad = None
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        result = layer(rows)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    (result * weights).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gradients = {"x": rows.grad, "A": a.grad, "B": b.grad}
    if layer.base_layer.bias is not None and layer.base_layer.bias.grad is not None:
        gradients["bias"] = layer.base_layer.bias.grad
    return {"result": result.detach(), **{name: value.clone() for name, value in gradients.items()}}


def exact_passes(layer: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same, computed in fp64 from the dequantized weight."""
    base = layer.base_layer
    weight = _weight_of(base).detach().double()
    x = rows.detach().double().requires_grad_()
    a, b = (part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    bias = None if base.bias is None else base.bias.detach().double().requires_grad_()
    result = linear(x, weight, bias) + layer.scaling["default"] * linear(linear(x, a), b)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2)).double()
    (result * weights).sum().backward()
    gradients = {"x": x.grad, "A": a.grad, "B": b.grad, **({} if bias is None else {"bias": bias.grad})}
    return {"result": result.detach(), **gradients}


def _weight_of(base: Any) -> torch.Tensor:
    """Return the weight that a layer multiplies by, `(out, in)`."""
    if type(base) is Conv1D:
        return base.weight.t()
    if type(base) is nn.Linear:
        return base.weight
    return bnb.functional.dequantize_4bit(base.weight, base.weight.quant_state)  # type: ignore[no-any-return]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    distance: float = ((actual.double() - expected).norm() / expected.norm()).item()
    return distance


def counted(function: Callable[[], Any]) -> Counter[str]:
    """Return the operations of `function` by name."""
    with CountOperations() as operations:
        function()
    counts: Counter[str] = operations.counts
    return counts
