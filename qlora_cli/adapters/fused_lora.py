"""A linear layer and its adapter as one step: x W^T + scale · (x A^T) B^T, for a frozen weight W.

PEFT computes the two products apart, and copies, scales and adds what they return. Here the adapter's product is added
by the matrix multiplication itself, forward and backward, so that no result is written more than once, and each of the
weight's dequantizations serves one product. The layers are PEFT's own in everything else, and an adapter that they
train is saved, loaded and merged as any.

There are two nodes in the graph of autograd. `_LowRank` saves all that the backward passes of both need, `_Sum` saves
nothing: so a layer that is recomputed under checkpointing ends before the product with its last weight, which nothing
in it needs. A compiled layer is one node as a whole; for the compiler it is `_Product` instead, whose formulas it
compiles, around the operators of the frozen weight.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qlora_cli.quantization.methods import all_methods
from qlora_cli.quantization.methods.fused_product import FusedProduct

CUDA = "cuda"


class _LowRank(torch.autograd.Function):
    """Returns x A^T, `(…, rank)`, and A, so that `_Sum`, which has all that its gradient needs, returns that."""

    @staticmethod
    def forward(
        ctx: Any, _: torch.Tensor, a_weight: torch.Tensor, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply; `rows`, `a` and `b` are x and the trained weights in the dtype of products. B is only saved."""
        low = linear(rows, a)
        ctx.save_for_backward(rows, low, a, b)
        ctx.dtype = a_weight.dtype
        ctx.set_materialize_grads(False)
        return low, a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor | None, of_a: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of A; that of x is returned by `_Sum`, as a whole."""
        return None, None if of_a is None else of_a.to(ctx.dtype), None, None, None


class _Sum(torch.autograd.Function):
    """Returns x W^T + bias + scale · low B^T, `(…, out)`, in the dtype that the layer returns without an adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        low: torch.Tensor,
        _: torch.Tensor,
        b_weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        b: torch.Tensor,
        product: FusedProduct,
        layer: nn.Module,
        scale: float,
        low_rank: Any,
    ) -> torch.Tensor:
        """Compute the sum; `low_rank` is the node of `_LowRank` that `low` and `_`, which is A, come from."""
        ctx.product, ctx.layer, ctx.scale, ctx.low_rank = product, layer, scale, low_rank
        ctx.dtypes = x.dtype, b_weight.dtype, None if bias is None else bias.dtype
        return product.product(layer, rows, low, b, scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, of A, of B and of the bias; that of `low` is part of those of x and A."""
        of_x, _, _, of_b, of_bias = ctx.needs_input_grad[:5]
        # Under checkpointing they can be read once only, by either node.
        saved = ctx.low_rank.saved_tensors
        wanted = of_x, ctx.low_rank.needs_input_grad[1], of_b, of_bias
        gradients = _gradients(gradient, saved, ctx.product, ctx.layer, ctx.scale, ctx.dtypes, wanted)
        return gradients[0], None, *gradients[1:], *[None] * 6


class _Product(torch.autograd.Function):
    """Returns what `_Sum` returns, as one node: the compiler can't trace a node that reads what another has saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a_weight: torch.Tensor,
        b_weight: torch.Tensor,
        bias: torch.Tensor | None,
        product: FusedProduct,
        layer: nn.Module,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Compute both products in `dtype`."""
        rows, a, b = x.to(dtype), a_weight.to(dtype), b_weight.to(dtype)
        low = linear(rows, a)
        ctx.save_for_backward(rows, low, a, b)
        ctx.product, ctx.layer, ctx.scale = product, layer, scale
        ctx.dtypes = x.dtype, b_weight.dtype, None if bias is None else bias.dtype
        ctx.a_dtype = a_weight.dtype
        return product.product(layer, rows, low, b, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, of A, of B and of the bias; the compiler drops those that nobody asks for."""
        wanted = True, True, True, ctx.dtypes[2] is not None
        of_x, of_a, of_b, of_bias = _gradients(
            gradient, ctx.saved_tensors, ctx.product, ctx.layer, ctx.scale, ctx.dtypes, wanted
        )
        return of_x, None if of_a is None else of_a.to(ctx.a_dtype), of_b, of_bias, None, None, None, None


def _gradients(
    gradient: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    product: FusedProduct,
    layer: nn.Module,
    scale: float,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, of A, of B and of the bias from that of the sum, or None for those not `wanted`.

    `saved` are the rows, their products with A, A and B, in the dtype of products, as the gradient of A will be;
    `dtypes` those of x, of B and of the bias.
    """
    of_x, of_a, of_b, of_bias = wanted
    x_dtype, b_dtype, bias_dtype = dtypes
    rows, low, a, b = saved
    shape = rows.shape
    rows, low = rows.reshape(-1, shape[-1]), low.reshape(-1, low.shape[-1])
    gradient = gradient.reshape(-1, gradient.shape[-1])
    gradient_of_bias = gradient.sum(dim=0, dtype=bias_dtype) if of_bias else None
    gradient = gradient.to(rows.dtype)
    gradient_of_low = gradient @ b
    if scale != 1:
        gradient_of_low.mul_(scale)
    gradient_of_a = gradient_of_low.t() @ rows if of_a else None
    gradient_of_b = None
    if of_b:
        gradient_of_b = gradient.t() @ low
        if scale != 1:
            gradient_of_b.mul_(scale)
        gradient_of_b = gradient_of_b.to(b_dtype)
    gradient_of_x = None
    if of_x:
        gradient_of_x = product.gradient(layer, gradient, gradient_of_low, a, x_dtype).view(shape)
    return gradient_of_x, gradient_of_a, gradient_of_b, gradient_of_bias


class FusedLoraLayer(LoraLayer):  # type: ignore[misc]
    """Makes a layer of PEFT's, which is the next base class, compute in one step where that is the same.

    Attributes:
        is_fused: Whether to do so at all.
    """

    fused_product: FusedProduct  # of each subclass
    is_fused = True

    def unfused_reason(self, dtype: torch.dtype | None, *, trains: bool) -> str | None:
        """Return in words why the layer computes as PEFT does; None if it does not.

        `dtype` is that of the adapter's products; dropout acts if the layer `trains`.
        """
        names = self._adapters()
        if not self.is_fused:
            return "training.fused_lora is off"
        if self.disable_adapters or self.merged or len(names) != 1:
            return "there is not one active adapter"
        name = names[0]
        if name in self.lora_variant:
            return "DoRA needs the norms of the whole weight"
        if trains and getattr(self.lora_dropout[name], "p", 0.0) > 0:
            return "dropout gives the adapter another input than the weight"
        if self.lora_B[name].bias is not None:
            return "the adapter has a bias"
        base = self.get_base_layer()
        if base.weight.requires_grad:
            return "the weight is trained itself"
        of_weight = self.fused_product.compute_dtype(base)
        if of_weight is None:
            return "the weight is stored so that only its own layer can multiply by it"
        if of_weight != dtype:
            return f"the weight's products are computed in {of_weight}, the adapter's in {dtype}"
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to pickle the layer: its class is made at run time, and would be looked for by name."""
        return _new_layer, (self.fused_product.lora_type,), self.__dict__

    def _adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the products of x, `(…, in)`, with weight and adapter, `(…, out)`, in the dtype that PEFT returns."""
        dtype = _dtype_of_adapter(x, self)
        is_usual = not args and not kwargs and x.numel() > 0
        if not is_usual or self.unfused_reason(dtype, trains=self.training) is not None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self._adapters()
        a_weight, b_weight, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        product, layer = self.fused_product, self.get_base_layer()
        rows, a, b = x.detach().to(dtype), a_weight.detach().to(dtype), b_weight.detach().to(dtype)
        if not torch.is_grad_enabled():
            return product.product(layer, rows, linear(rows, a), b, scale, x.dtype)
        if torch.compiler.is_compiling():
            compiled: Any = _Product.apply
            return compiled(x, a_weight, b_weight, layer.bias, product, layer, scale, dtype)  # type: ignore[no-any-return]
        multiply: Any = _LowRank.apply
        low, factor = multiply(x, a_weight, rows, a, b)
        if low.grad_fn is None:  # nothing before B is trained
            return super().forward(x)  # type: ignore[no-any-return]
        add: Any = _Sum.apply
        return add(x, low, factor, b_weight, layer.bias, rows, b, product, layer, scale, low.grad_fn)  # type: ignore[no-any-return]


def _dtype_of_adapter(x: torch.Tensor, layer: LoraLayer) -> torch.dtype | None:
    """Return the dtype in which PEFT multiplies `x` and the adapter of `layer`; None if it has none."""
    device = CUDA if x.is_meta else x.device.type  # tensors of a prediction act as a GPU's
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next((layer.lora_A[name].weight.dtype for name in layer.active_adapters if name in layer.lora_A), None)


def fused_types() -> dict[type[nn.Module], type[nn.Module]]:
    """Return a fused layer for each type of frozen layer that allows it, as custom modules of PEFT."""
    return {product.layer_type: _fused_type(product) for method in all_methods() for product in method.fused_products}


@cache
def _fused_type(product: FusedProduct) -> type[nn.Module]:
    """Return PEFT's layer for a type of frozen layer, made to compute in one step."""
    parent = product.lora_type
    name, attributes = f"Fused{parent.__name__}", {"fused_product": product, "__module__": __name__}
    return type(name, (FusedLoraLayer, parent), attributes)


def _new_layer(lora_type: type[nn.Module]) -> nn.Module:
    """Return a fused layer without its state, of the kind that computes for PEFT's `lora_type`."""
    fused = next(layer_type for layer_type in fused_types().values() if lora_type in layer_type.__bases__)
    layer: nn.Module = fused.__new__(fused)
    return layer


def fused_layers(model: nn.Module) -> Iterator[FusedLoraLayer]:
    """Yield the layers of `model` that compute in one step where that is the same."""
    return (module for module in model.modules() if isinstance(module, FusedLoraLayer))


def switch_fused(model: nn.Module, *, enabled: bool) -> None:
    """Compute in one step where possible, or as PEFT does everywhere."""
    for layer in fused_layers(model):
        layer.is_fused = enabled


def unfused(model: nn.Module, dtype: torch.dtype) -> Counter[str]:
    """Return how many of these layers compute as PEFT does in training, by the reason in words.

    `dtype` is that of the adapter's products.
    """
    reasons = (layer.unfused_reason(dtype, trains=True) for layer in fused_layers(model))
    return Counter(reason for reason in reasons if reason is not None)
