"""What the operations of a traced step cost: FLOPs, the bytes that each moves, its launches.

What an operation belongs to follows from the operator, such as a matrix product, and from the module that computes it
or, in the backward pass, whose forward pass made the autograd node. No implementation is named: an operator that no
rule knows is counted by the bytes of its inputs and outputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from qlora_cli.memory.tracing.owners import Owner
from qlora_cli.quantization.methods import all_methods
from qlora_cli.timing.operation import Operation, OperationKind, Pass


def operations_of(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: Any,
    owner: Owner,
    run_in: Pass,
    num_tokens: int,
) -> Iterator[Operation]:
    """Yield what a call of `func` by `owner` costs; a product with a quantized weight is two operations,
    and with an adapter's added to it three.

    `num_tokens` are those of a micro-batch.
    """
    name, operator = _names(func)
    is_free = func.is_view or operator.endswith("view") or operator in FREE
    outputs = () if is_free else _tensors((result,))
    if not outputs:
        yield _free(run_in, owner.kind, name)
        return
    inputs = _tensors((*args, *kwargs.values()))
    if name in PRODUCTS:
        yield from _product(name, inputs, outputs[0], run_in)
    elif name in SUMS:
        *of_base, low, b = inputs
        yield from _product(name, of_base, outputs[0], run_in, dequantizes=SUMS[name])
        flops = 2 * outputs[0].numel() * low.shape[-1]
        num_bytes = _sum_bytes((low, b)) + 2 * _nbytes(outputs[0])
        yield Operation(run_in, OperationKind.LORA_GEMM, name, flops, num_bytes, 1, is_fp32=_is_fp32(low))
    elif "dot_product" in operator and any(kernel in operator for kernel in CAUSAL_AT):
        yield _attention(func, args, kwargs, inputs, outputs, run_in)
    elif operator in GEMMS:
        yield _gemm(name, _tensors(args), outputs[0], owner, run_in, num_tokens)
    elif "grouped_mm" in operator:  # of experts
        yield _grouped(name, inputs, outputs, run_in)
    elif "dequantize" in operator:
        yield Operation(run_in, OperationKind.DEQUANTIZATION, name, 0, _sum_bytes(inputs) + _sum_bytes(outputs), 1)
    else:
        kind = OperationKind.RESIDUAL if owner.kind == OperationKind.BASE_GEMM else owner.kind
        num_bytes = _moved_bytes(operator, inputs, outputs)
        yield Operation(run_in, kind, name, 0, num_bytes, 1, is_known=func.namespace in ("aten", "prims"))


PRODUCTS = frozenset().union(*(method.products for method in all_methods()))
# Products to which that of an adapter is added in place, and whether their weights are dequantized first.
SUMS = {product.operator: product.dequantizes for method in all_methods() for product in method.fused_products}
GEMMS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
TILE = 128  # rows and columns of the results that one multiprocessor computes at a time
FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    "lift_fresh",
)
FILLS = (
    *("full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"),
    *("fill", "fill_", "zero_", "arange"),
)
GATHERS = ("embedding", "index", "index_select", "gather")
SCATTERS = ("index_copy_", "index_put_", "scatter_")  # they write as many values as they read of the source
CAUSAL_SHARE = 0.5  # of the scores that a causal kernel computes
# The position of `is_causal` among the arguments of a kernel of attention, forward and backward.
CAUSAL_AT = {"flash_attention_for_cpu": (4, 7), "flash_attention": (4, 11), "efficient": (6, 11), "cudnn": (6, 14)}
BACKWARD_PRODUCTS = 2.5  # of attention: five matrix products, where the forward pass has two


@cache
def _names(func: Any) -> tuple[str, str]:
    """Return the name of an operator without its overload: with its namespace, and alone."""
    name: str = func.name().partition(".")[0]
    return name, name.partition("::")[2]


@cache
def _free(run_in: Pass, kind: OperationKind, name: str) -> Operation:
    """Return an operation that takes time of the host alone."""
    return Operation(run_in, kind, name)


def _product(
    name: str, inputs: Sequence[torch.Tensor], output: torch.Tensor, run_in: Pass, *, dequantizes: bool = True
) -> Iterator[Operation]:
    """Yield the dequantization of a weight to 16 bit and the product with it, as on a GPU for thousands of tokens.

    The first input is the activations, `(…, in)`, the others are the weight or its codes and constants; the output is
    `(…, out)`.
    """
    activations, *stored = inputs
    wide, narrow = activations.shape[-1], output.shape[-1]
    weight_bytes = wide * narrow * activations.element_size()
    if dequantizes:
        kernels = 1 if len(stored) <= 2 else 3  # quantized constants: their product and their offset
        yield Operation(run_in, OperationKind.DEQUANTIZATION, name, 0, _sum_bytes(stored) + weight_bytes, kernels)
    yield Operation(
        run_in,
        OperationKind.BASE_GEMM,
        name,
        flops=2 * output.numel() * wide,
        num_bytes=_sum_bytes((activations, output)) + weight_bytes,
        kernels=1,
        is_fp32=_is_fp32(activations),
        tiles=num_tiles(output.numel() // narrow, narrow),
    )


def _gemm(
    name: str, inputs: Sequence[torch.Tensor], output: torch.Tensor, owner: Owner, run_in: Pass, num_tokens: int
) -> Operation:
    """Return a matrix product, `(…, m, k)` by `(…, k, n)`: the last two inputs, after what they are added to."""
    first, second = [tensor for tensor in inputs if tensor.dim() > 1][-2:]
    m, k, n = first.shape[-2], first.shape[-1], second.shape[-1]
    flops = 2 * prod(first.shape[:-2]) * m * k * n
    kind = owner.kind
    if owner.width:
        # A product of the base has tokens, inputs and outputs as its sides; one of the adapter is narrower.
        kind = OperationKind.LORA_GEMM if min(m, k, n) < min(owner.width, num_tokens) else OperationKind.BASE_GEMM
    elif kind == OperationKind.MLP:
        kind = OperationKind.BASE_GEMM  # of experts
    elif kind == OperationKind.ROPE:
        kind = OperationKind.ATTENTION
    return Operation(
        run_in,
        kind,
        name,
        flops,
        num_bytes=_sum_bytes(inputs) + _nbytes(output),
        kernels=1,
        is_fp32=_is_fp32(first),
        tiles=prod(first.shape[:-2]) * num_tiles(m, n),
    )


def _grouped(name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], run_in: Pass) -> Operation:
    """Return the products of experts, `(rows, in)` by `(experts, in, out)`: each row with the weight of one expert."""
    first, second = inputs[:2]
    flops = 2 * first.shape[-2] * first.shape[-1] * second.shape[-1]
    return Operation(
        run_in,
        OperationKind.BASE_GEMM,
        name,
        flops * len(outputs),  # backward, PyTorch's fallback computes two of them
        num_bytes=_sum_bytes(inputs) + _sum_bytes(outputs),
        kernels=1,
        is_fp32=_is_fp32(first),
    )


def num_tiles(m: int, n: int) -> int:
    """Return the tiles of a product with `(m, n)` results; 0 for a narrow one, whose sum is divided instead."""
    return -(-m // TILE) * -(-n // TILE) if min(m, n) >= TILE else 0


def _is_fp32(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32


def _attention(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    run_in: Pass,
) -> Operation:
    """Return an attention kernel that stores no scores; `query` and `key` are `(batch, heads, seq, head_dim)`."""
    name, operator = _names(func)
    is_backward = operator.endswith("backward")
    query, key, value = args[1:4] if is_backward else args[:3]
    scores = prod(query.shape[:3]) * key.shape[2]
    flops = 2 * scores * (query.shape[-1] + value.shape[-1])
    at = next(position for kernel, position in CAUSAL_AT.items() if kernel in operator)[is_backward]
    if args[at] if len(args) > at else kwargs.get("is_causal", False):
        flops *= CAUSAL_SHARE
    if is_backward:
        flops *= BACKWARD_PRODUCTS
    kernels = 4 if is_backward else 1  # the product of output and gradient, the pass itself, two conversions
    num_bytes = _sum_bytes(inputs) + _sum_bytes(outputs)
    return Operation(run_in, OperationKind.ATTENTION, name, int(flops), num_bytes, kernels)


def _moved_bytes(operator: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    """Return the bytes of inputs and outputs, without those that are not read."""
    written = _sum_bytes(outputs)
    if operator in FILLS:
        return written
    if operator == "copy_":
        return _sum_bytes(inputs[1:]) + written
    if operator in GATHERS:
        return 2 * written + _sum_bytes(tensor for tensor in inputs[1:] if not tensor.is_floating_point())
    if operator in SCATTERS:
        return _sum_bytes(inputs[1:]) + _nbytes(inputs[-1])
    return _sum_bytes(inputs) + written


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among arguments or results, some of which are lists of them."""
    tensors = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [item for item in value if isinstance(item, torch.Tensor)]
    return tensors


def _sum_bytes(tensors: Any) -> int:
    return sum(map(_nbytes, tensors))


def _nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes that are read of a tensor: one value of a dimension that is expanded."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()
