"""Products with 4-bit weights to which an adapter's are added in place, as one operator of PyTorch.

As an operator it is known to selective checkpointing, to the compiler and to a trace on the meta device. It is not
declared by `torch.library.custom_op`, which takes 9 µs more for each call: 2 ms for the layers of an 8B.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

from qlora_cli.quantization.blocks import NESTED_BLOCK_SIZE
from qlora_cli.quantization.methods.fused_product import FusedProduct
from qlora_cli.quantization.methods.method import Temporaries

OPERATOR = "qlora::four_bit_product"
GRADIENT = "qlora::four_bit_gradient"
FLOAT_BYTES = 4

torch.library.define(
    OPERATOR,
    "(Tensor rows, Tensor codes, int[] shape, Tensor absmax, int blocksize, str quant_type, Tensor? bias, "
    "Tensor? absmax_8bit, Tensor? absmax_code, Tensor? absmax_offset, Tensor low, Tensor b, float scale, "
    "ScalarType dtype) -> Tensor",
)


@torch.library.impl(OPERATOR, "default")
def _compute(
    rows: torch.Tensor,
    codes: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    low: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    result: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        rows,
        codes,
        shape,
        absmax,
        blocksize,
        quant_type,
        bias,
        absmax_8bit=absmax_8bit,
        absmax_code=absmax_code,
        absmax_offset=absmax_offset,
    )
    result = result.to(dtype)
    result.view(-1, result.shape[-1]).addmm_(low.view(-1, low.shape[-1]).to(dtype), b.t().to(dtype), alpha=scale)
    return result


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]
def _fake(rows: torch.Tensor, _codes: torch.Tensor, shape: Sequence[int], *others: Any) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], shape[0]), dtype=others[-1])


torch.library.define(
    GRADIENT,
    "(Tensor gradient, Tensor codes, int[] shape, Tensor absmax, int blocksize, str quant_type, Tensor? absmax_8bit, "
    "Tensor? absmax_code, Tensor? absmax_offset, Tensor of_low, Tensor a, ScalarType dtype) -> Tensor",
)


def _compute_gradient(
    gradient: torch.Tensor,
    codes: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    of_low: torch.Tensor,
    a: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    nested = absmax_8bit, absmax_code, absmax_offset
    result = gradient @ _dequantized(codes, shape, absmax, blocksize, quant_type, *nested, gradient.dtype)
    result = result.to(dtype)
    return result.addmm_(of_low.to(dtype), a.to(dtype))


torch.library.impl(GRADIENT, "default", _compute_gradient)


@torch.library.register_fake(GRADIENT)  # type: ignore[untyped-decorator]
def _fake_gradient(gradient: torch.Tensor, _codes: torch.Tensor, shape: Sequence[int], *others: Any) -> torch.Tensor:
    return gradient.new_empty((gradient.shape[0], shape[1]), dtype=others[-1])


def _dequantized(
    codes: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weight in `dtype` at once, not by way of the dtype that it was quantized from."""
    if absmax_8bit is not None and absmax_offset is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax_8bit, absmax, absmax_code, NESTED_BLOCK_SIZE, torch.float32
        )
        absmax.add_(absmax_offset)
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, blocksize, quant_type, shape, dtype
    )
    return weight


def gemm_temporaries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Temporaries:
    """Return the temporaries of `bitsandbytes::gemm_4bit` on a GPU.

    `bitsandbytes/backends/cuda/ops.py`: beyond 1536 rows the whole weight is dequantized and multiplied by cuBLAS;
    with double quantization its constants are dequantized too, to fp32. Below, a fused kernel may need neither, by
    heuristics for each GPU; the peak is the same, since the backward pass always dequantizes.
    """
    return _temporaries(args, is_nested=kwargs.get("absmax_8bit") is not None)


def sum_temporaries(args: tuple[Any, ...], _: dict[str, Any]) -> Temporaries:
    """Return the temporaries of the product to which an adapter's is added; in a wider dtype, it is copied first."""
    rows, shape, dtype = args[0], args[2], args[-1]
    of_gemm = _temporaries(args, is_nested=args[7] is not None)
    if dtype == rows.dtype:
        return of_gemm
    num_results = rows.numel() // shape[1] * shape[0]
    narrow, wide = num_results * rows.element_size(), num_results * dtype.itemsize
    # The weight is released before the copy is made.
    return Temporaries(before=(max(sum(of_gemm.before) + narrow - wide, narrow),), uses_cublas=True)


def _temporaries(args: tuple[Any, ...], *, is_nested: bool) -> Temporaries:
    rows, shape, block_size = args[0], args[2], args[4]
    weight = prod(shape) * rows.element_size()
    constants = prod(shape) // block_size * FLOAT_BYTES
    return Temporaries(before=(constants, weight) if is_nested else (weight,), uses_cublas=True)


class FourBitProduct(FusedProduct):
    """Products with bitsandbytes' 4-bit weights."""

    layer_type = Linear4bit
    lora_type = LoraLinear4bit
    operator = OPERATOR
    dequantizes = True

    def compute_dtype(self, layer: Any) -> torch.dtype | None:
        """Return the layer's own; None before it has one and is quantized, or if the codes are in another order.

        bitsandbytes repacks codes for some CPUs, and its early versions stored weights as `(in, out)`.
        """
        state = _state_of(layer)
        if state is None or (state.nested and state.state2.blocksize != NESTED_BLOCK_SIZE):
            return None
        is_packed = getattr(state, "packing_format_for_cpu", False)  # only set by packing
        if is_packed or tuple(state.shape) != (layer.out_features, layer.in_features):
            return None
        return layer.compute_dtype  # type: ignore[no-any-return]

    def product(
        self, layer: Any, rows: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float, x_dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the product in the dtype of x, by kernels that dequantize as they multiply, or before."""
        codes, state, nested = _stored(layer)
        bias = layer.bias
        result: torch.Tensor = torch.ops.qlora.four_bit_product.default(
            rows,
            codes,
            state.shape,
            state.state2.absmax if state.nested else state.absmax,
            state.blocksize,
            state.quant_type,
            None if bias is None else bias.to(rows.dtype),
            *nested,
            low,
            b,
            scale,
            x_dtype,
        )
        return result

    def gradient(
        self, layer: Any, gradient: torch.Tensor, of_low: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the gradient of the rows: one operator in compiled code; else a trace sees each operation of it."""
        codes, state, nested = _stored(layer)
        compute: Any = _compute_gradient
        if torch.compiler.is_compiling():
            compute = torch.ops.qlora.four_bit_gradient.default
        result: torch.Tensor = compute(
            gradient,
            codes,
            state.shape,
            state.state2.absmax if state.nested else state.absmax,
            state.blocksize,
            state.quant_type,
            *nested,
            of_low,
            a,
            dtype,
        )
        return result


def _state_of(layer: Any) -> QuantState | None:
    """Return the constants of a layer's weight; of a weight that was gathered, only the layer has them."""
    holder = layer.weight if hasattr(layer.weight, "quant_state") else layer
    state: QuantState | None = getattr(holder, "quant_state", None)
    return state


def _stored(layer: Any) -> tuple[torch.Tensor, QuantState, tuple[torch.Tensor | None, ...]]:
    """Return the codes, the constants, and of these what only double quantization has."""
    state = _state_of(layer)
    assert state is not None, "the layer has a dtype in which it multiplies"
    nested = (state.absmax, state.state2.code, state.offset) if state.nested else (None, None, None)
    return layer.weight.view(-1, 1), state, nested
