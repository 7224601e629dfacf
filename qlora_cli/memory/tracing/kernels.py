"""The allocations of CUDA kernels other than their results: temporaries without a tensor, and workspaces of cuBLAS.

Each term comes from the source of PyTorch or of the kernel, which its comment names. The quantization methods declare
the allocations of products with their weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.memory.tracing.meta_results import Asked, shared_results
from qlora_cli.quantization.methods import all_methods
from qlora_cli.quantization.methods.method import Temporaries

aten = torch.ops.aten
KIB, MIB = 1024, 1024**2
WORKSPACES = "workspaces"
# Weights that other processes sent, and what they were received in: another stream's memory, in a pool of its own.
GATHERED, GATHER_BUFFERS = "gathered", "gather buffers"
CUBLAS = "cublas"  # the label of its workspaces, whose size depends on the GPU: `cublas_workspace_bytes`
FLOAT_BYTES = 4

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Temporaries | None]


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What is known of `operator`: what it allocates in addition to its results, and its results on meta; or None."""

    operator: Any
    rule: Rule | None
    on_meta: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cublas_workspace_bytes(capability: tuple[int, int], *, deterministic: bool = False) -> int:
    """Return the bytes of the workspace of one cuBLAS handle.

    `aten/src/ATen/cuda/CublasHandlePool.cpp`, `parseChosenWorkspaceSize`: `:4096:2:16:8` (in KiB), and 32 MiB on
    Hopper and data-centre Blackwell; `deterministic`: `:16:8`, as `enable_full_determinism` of transformers sets it.
    """
    if deterministic:
        return 16 * 8 * KIB
    return 32 * MIB if capability[0] in (9, 10) else (2 * 4096 + 8 * 16) * KIB


class Kernels:
    """The kernels of a GPU of this compute capability."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self._rules: dict[Any, Rule] = {
            aten._softmax_backward_data.default: _softmax_backward,
            aten._scaled_dot_product_efficient_attention_backward.default: self._efficient_backward,
            aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
            **dict.fromkeys(
                (aten.mm.default, aten.mm.out, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
                _gemm,
            ),
        }
        self._results = shared_results(torch.get_default_dtype())
        self._known: dict[int, _Kernel] = {}
        self._operators = {name: rule for method in all_methods() for name, rule in method.operators.items()}

    def temporaries(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Temporaries | None:
        """Return what `func` allocates in addition to its results; None for nothing."""
        rule = self._kernel(func).rule
        return None if rule is None else rule(args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of `func`, even if its size depends on values, which meta tensors do not have."""
        on_meta = self._kernel(func).on_meta
        if on_meta is None or args[0].device.type != "meta":
            return self._results.run(func, args, kwargs)
        self._results.asked = None
        return on_meta(func, args, kwargs)

    @property
    def asked(self) -> Asked | None:
        """What the last result follows from, equal for equal operators and arguments; None if it is not known."""
        return self._results.asked

    def _kernel(self, func: Any) -> _Kernel:
        """Return what is known of an operator, for those that are not PyTorch's own by a quantization method."""
        # Every operator of a trace comes here, and its own hash is computed in Python.
        known = self._known.get(id(func))
        if known is None:
            declared = None if func.namespace == "aten" else self._operators.get(f"{func.namespace}::{func._opname}")
            rule = self._rules.get(func, None if declared is None else declared.temporaries)
            known = _Kernel(func, rule, None if declared is None else declared.on_meta)
            self._known[id(func)] = known
        return known

    def _efficient_backward(self, args: tuple[Any, ...], _: dict[str, Any]) -> Temporaries:
        """Return what the backward pass of the memory-efficient kernel allocates.

        `transformers/cuda/attention_backward.cu` and `mem_eff_attention/kernel_backward.h`: `delta`, `(batch, heads,
        queries)` in fp32, and for a result in 16 bit an fp32 accumulator of the gradient of the queries, in blocks
        of 64 queries (`GradQTempStorage`: 16 bytes of locks and the tile). Keys and values have accumulators too
        where the head dimension is too large for the registers.
        """
        _, query, key, value = args[:4]
        batch, heads, num_queries, head_dim = query.shape
        num_keys, value_dim = key.shape[2], value.shape[3]
        delta = batch * heads * num_queries * FLOAT_BYTES
        if query.element_size() > 2:
            return Temporaries(after=(delta,))
        largest_dim = max(head_dim, value_dim)
        has_large_blocks = self.capability >= (8, 0) and largest_dim > 64
        rows = 128 if has_large_blocks else 64
        columns = 128 if has_large_blocks and largest_dim <= 96 else 64
        tile = 16 + rows * columns * FLOAT_BYTES
        blocks = -(-num_queries // rows) * -(-head_dim // columns)
        workspace = blocks * tile
        if largest_dim > rows:  # kOutputInRF is false
            workspace += (
                _ceil(num_keys, columns) * (_ceil(head_dim, columns) + _ceil(value_dim, columns)) * FLOAT_BYTES
            )
        return Temporaries(after=(delta, batch * heads * workspace))


def _gemm(_: tuple[Any, ...], __: dict[str, Any]) -> Temporaries:
    # No size: the first product of a thread allocates the workspace, which all later ones use, and a replay sets the
    # size, so that a trace holds for GPUs with other workspaces.
    return Temporaries(uses_cublas=True)


def _softmax_backward(args: tuple[Any, ...], _: dict[str, Any]) -> Temporaries:
    # aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out: `tmp = grad * output`.
    return Temporaries(after=(_nbytes(args[0]),))


def _flash_backward(args: tuple[Any, ...], _: dict[str, Any]) -> Temporaries:
    """Return what the backward pass of flash attention allocates.

    `flash_attn/flash_api.cpp`, `mha_bwd`: `softmax_d` and `dq_accum` in fp32, rounded up to 128 queries and 32 (or 64)
    columns; with grouped queries, gradients of keys and values for every query head, which are then summed.
    """
    _, query, key = args[:3]
    batch, heads, num_queries, head_dim = query.shape
    rounded, columns = _ceil(num_queries, 128), _ceil(head_dim, 32 if head_dim <= 128 else 64)
    sizes = [batch * heads * rounded * FLOAT_BYTES, batch * heads * rounded * columns * FLOAT_BYTES]
    if key.shape[1] != heads:
        sizes += 2 * [batch * heads * key.shape[2] * head_dim * key.element_size()]
    return Temporaries(after=tuple(sizes))
