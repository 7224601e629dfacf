"""Count what a traced training step computes: for each operation its FLOPs, the bytes that it moves, its launches.

The step is the one that `qlora inspect-memory` traces; a second dispatch mode on top of the tracer's sees the same
operations. What an operation belongs to follows from the operator, such as a matrix product, and from the module
that computes it or, in the backward pass, whose forward pass made the autograd node. No implementation is named: an
operator that no rule knows is counted by the bytes of its inputs and outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.pytorch_utils import Conv1D

from qlora_cli.memory.tracing.functions import GpuFunctions
from qlora_cli.memory.tracing.layers import represented_by
from qlora_cli.memory.tracing.meta_model import MetaModel
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.memory.tracing.training_step import StepSettings, TrainingStep
from qlora_cli.quantization.methods import all_methods

OWNER = "owner"  # the key in the metadata of an autograd node


class Kind(StrEnum):
    """What an operation belongs to."""

    BASE_GEMM = "base GEMM"
    DEQUANTIZATION = "dequantization"
    LORA_GEMM = "LoRA GEMM"
    LORA = "LoRA element-wise"
    NORM = "norm"
    ROPE = "RoPE"
    MLP = "SwiGLU"
    ATTENTION = "attention"
    LOSS = "loss"
    RESIDUAL = "residual"
    EMBEDDING = "embedding"
    OPTIMIZER = "optimizer"
    OTHER = "other"


class Pass(StrEnum):
    """When an operation runs."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Operation:
    """A call of an operator: FLOPs, bytes read and written, launched kernels; without launches, host time only."""

    run_in: Pass
    kind: Kind
    operator: str
    flops: int = 0
    num_bytes: int = 0
    kernels: int = 0
    is_known: bool = True  # False: counted by its bytes alone, though it may compute more


@dataclass(frozen=True, slots=True)
class Owner:
    """The module that an operation belongs to; `width` is the smaller side of its weight, if it is a linear layer."""

    kind: Kind
    width: int = 0


@dataclass(slots=True)
class Count:
    """The operations of a traced step, each with its part: the index of a traced layer, or a mark outside of them."""

    operations: list[tuple[Any, Operation]] = field(default_factory=list)
    meta_model: MetaModel | None = None

    def loop(
        self, meta_model: MetaModel, settings: StepSettings, trace: MemoryTrace, functions: GpuFunctions
    ) -> TrainingStep:
        """Return the step of `qlora train`, whose operations are counted here when it runs."""
        self.operations.clear()  # a model whose layers are uneven is traced a second time
        self.meta_model = meta_model
        return _CountedStep(meta_model, settings, trace, functions, self)

    def extended(self) -> list[tuple[int, Operation]]:
        """Return the operations of the whole model, each with how often it runs: a layer stands for all like it."""
        assert self.meta_model is not None, "no step was traced"
        stack, chosen = self.meta_model.stack, self.meta_model.chosen
        represented = [] if stack is None else represented_by(stack, chosen)
        return [
            (represented.count(part) if stack is not None and isinstance(part, int) else 1, operation)
            for part, operation in self.operations
        ]


class _CountedStep(TrainingStep):
    """A step of `qlora train` that counts its operations."""

    def __init__(
        self,
        meta_model: MetaModel,
        settings: StepSettings,
        trace: MemoryTrace,
        functions: GpuFunctions,
        count: Count,
    ) -> None:
        super().__init__(meta_model, settings, trace, functions)
        self._count = count
        self._owners = _Owners(trace)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Watch the modules, too."""
        handles = self._owners.watch(self.model, self.base)
        try:
            with super().prepared():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> None:
        """Run the step, and count."""
        num_tokens = self.settings.batch_size * self.settings.length
        with _Counting(self._count, self.trace, self._owners, num_tokens):
            super().run()


class _Owners:
    """Follows which module computes: by hooks in the forward pass and its recomputation, by nodes in the backward."""

    def __init__(self, trace: MemoryTrace) -> None:
        self._trace = trace
        self._entered: list[Owner] = []
        self._of_node = Owner(Kind.LOSS)  # no module computes the loss

    @property
    def is_recomputing(self) -> bool:
        """Whether a module computes within the backward pass."""
        return self._trace.in_autograd_thread and bool(self._entered)

    @property
    def current(self) -> Owner:
        """The owner of the next operation."""
        if self._entered:
            return self._entered[-1]
        return self._of_node if self._trace.in_autograd_thread else Owner(Kind.LOSS)

    def watch(self, model: nn.Module, base: Any) -> list[Any]:
        """Register hooks on the modules that own operations."""
        handles = []
        adapters: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                adapters.append(f"{name}.")
            elif name.startswith(tuple(adapters)):
                continue  # a part of the adapter or of its base layer: the adapter's, by the operator
            owner = _owner(module, base)
            if owner is None:
                continue

            def enter(_: nn.Module, args: Any, kwargs: Any, owner: Owner = owner) -> None:
                if not self._trace.in_autograd_thread:
                    self._claim((args, kwargs), self.current)
                self._entered.append(owner)

            def leave(_: nn.Module, __: Any, output: Any, owner: Owner = owner) -> None:
                self._entered.pop()
                if not self._trace.in_autograd_thread:
                    self._claim(output, owner)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            # A recomputation ends by an exception.
            handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def _claim(self, tensors: Any, owner: Owner) -> None:
        """Note the owner of each node that led to the tensors and has none yet."""
        nodes = [tensor.grad_fn for tensor in _tensors(tensors)]
        while nodes:
            node = nodes.pop()
            if node is None or not node.next_functions:
                continue
            metadata: Any = node.metadata  # a dict; its stub says a method
            if OWNER in metadata:
                continue
            metadata[OWNER] = owner
            node.register_prehook(self._enter_node(owner))
            nodes += [following for following, _ in node.next_functions]

    def _enter_node(self, owner: Owner) -> Any:
        def enter(_: Any) -> None:
            self._of_node = owner

        return enter


def _owner(module: nn.Module, base: Any) -> Owner | None:
    """Return the owner of what `module` itself computes; None if that is the module around it."""
    if module is base.get_output_embeddings():
        return Owner(Kind.LOSS)
    if module is base.base_model:
        return Owner(Kind.OTHER)
    if isinstance(module, LoraLayer):
        return Owner(Kind.LORA, min(module.in_features, module.out_features))
    if isinstance(module, nn.Linear | Conv1D):
        return Owner(Kind.BASE_GEMM, min(module.weight.shape))
    name = type(module).__name__
    return next((Owner(kind) for end, kind in NAMES.items() if name.endswith(end)), None)


# How the classes of transformers end, whatever the family.
NAMES = {
    "Norm": Kind.NORM,
    "RotaryEmbedding": Kind.ROPE,
    "Attention": Kind.ROPE,  # what an attention layer computes besides products and the attention itself
    "MLP": Kind.MLP,
    "Experts": Kind.MLP,
    "DecoderLayer": Kind.RESIDUAL,
    "Embedding": Kind.EMBEDDING,
}


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each operation that the tracer sees."""

    def __init__(self, count: Count, trace: MemoryTrace, owners: _Owners, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = count.operations
        self._trace = trace
        self._owners = owners
        self._num_tokens = num_tokens

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._owners.is_recomputing:
            run_in = Pass.RECOMPUTE
        else:
            run_in = Pass.BACKWARD if self._trace.in_autograd_thread else Pass.FORWARD
        part = self._trace.segments[-1].mark[1]
        for operation in operations_of(func, args, kwargs, result, self._owners.current, run_in, self._num_tokens):
            self._operations.append((part, operation))
        return result


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
    name = f"{func.namespace}::{func._opname}"
    inputs, outputs = _tensors((args, kwargs)), _tensors(result)
    if func.is_view or func._opname in FREE or not outputs:
        yield Operation(run_in, owner.kind, name)
    elif name in PRODUCTS:
        yield from _product(name, inputs, outputs[0], run_in)
    elif name in SUMS:
        *of_base, low, b = inputs
        yield from _product(name, of_base, outputs[0], run_in)
        flops = 2 * outputs[0].numel() * low.shape[-1]
        yield Operation(run_in, Kind.LORA_GEMM, name, flops, _sum_bytes((low, b)) + 2 * _nbytes(outputs[0]), 1)
    elif "attention" in func._opname:
        yield _attention(func, args, kwargs, inputs, outputs, run_in)
    elif func._opname in GEMMS:
        yield _gemm(name, _tensors(args), outputs[0], owner, run_in, num_tokens)
    elif "dequantize" in func._opname:
        yield Operation(run_in, Kind.DEQUANTIZATION, name, 0, _sum_bytes(inputs) + _sum_bytes(outputs), 1)
    else:
        kind = Kind.RESIDUAL if owner.kind == Kind.BASE_GEMM else owner.kind
        num_bytes = _moved_bytes(func, inputs, outputs)
        yield Operation(run_in, kind, name, 0, num_bytes, 1, is_known=func.namespace in ("aten", "prims"))


PRODUCTS = frozenset().union(*(method.products for method in all_methods()))
# Products to which that of an adapter is added in place.
SUMS = frozenset(method.fused_product.operator for method in all_methods() if method.fused_product is not None)
GEMMS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "lift_fresh", "_local_scalar_dense"),
)
FILLS = (
    *("full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"),
    *("fill", "fill_", "zero_", "arange"),
)
GATHERS = ("embedding", "index", "index_select", "gather")
SCATTERS = ("index_copy_", "index_put_", "scatter_")  # they write as many values as they read of the source
CAUSAL_SHARE = 0.5  # of the scores that a causal kernel computes
BACKWARD_PRODUCTS = 2.5  # of attention: five matrix products, where the forward pass has two


def _product(name: str, inputs: Sequence[torch.Tensor], output: torch.Tensor, run_in: Pass) -> Iterator[Operation]:
    """Yield the dequantization of a weight to 16 bit and the product with it, as on a GPU for thousands of tokens.

    The first input is the activations, `(…, in)`, the others are codes and constants; the output is `(…, out)`.
    """
    activations, *stored = inputs
    wide, narrow = activations.shape[-1], output.shape[-1]
    weight_bytes = wide * narrow * activations.element_size()
    kernels = 1 if len(stored) <= 2 else 3  # constants that are quantized themselves: their product and their offset
    yield Operation(run_in, Kind.DEQUANTIZATION, name, 0, _sum_bytes(stored) + weight_bytes, kernels)
    flops = 2 * output.numel() * wide
    yield Operation(run_in, Kind.BASE_GEMM, name, flops, _sum_bytes((activations, output)) + weight_bytes, 1)


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
        kind = Kind.LORA_GEMM if min(m, k, n) < min(owner.width, num_tokens) else Kind.BASE_GEMM
    elif kind == Kind.MLP:
        kind = Kind.BASE_GEMM  # of experts
    elif kind == Kind.ROPE:
        kind = Kind.ATTENTION
    return Operation(run_in, kind, name, flops, _sum_bytes(inputs) + _nbytes(output), 1)


def _attention(
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    run_in: Pass,
) -> Operation:
    """Return an attention kernel that stores no scores; `query` and `key` are `(batch, heads, seq, head_dim)`."""
    bound = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    query, key, value = bound["query"], bound["key"], bound["value"]
    scores = prod(query.shape[:3]) * key.shape[2]
    flops = 2 * scores * (query.shape[-1] + value.shape[-1])
    if bound.get("is_causal"):
        flops *= CAUSAL_SHARE
    is_backward = "backward" in func._opname
    if is_backward:
        flops *= BACKWARD_PRODUCTS
    kernels = 4 if is_backward else 1  # the product of output and gradient, the pass itself, two conversions
    num_bytes = _sum_bytes(inputs) + _sum_bytes(outputs)
    return Operation(run_in, Kind.ATTENTION, f"{func.namespace}::{func._opname}", int(flops), num_bytes, kernels)


def _moved_bytes(func: Any, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> int:
    """Return the bytes of inputs and outputs, without those that are not read."""
    written = _sum_bytes(outputs)
    if func._opname in FILLS:
        return written
    if func._opname == "copy_":
        return _sum_bytes(inputs[1:]) + written
    if func._opname in GATHERS:
        return 2 * written + _sum_bytes(tensor for tensor in inputs[1:] if not tensor.is_floating_point())
    if func._opname in SCATTERS:
        return _sum_bytes(inputs[1:]) + _nbytes(inputs[-1])
    return _sum_bytes(inputs) + written


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _sum_bytes(tensors: Any) -> int:
    return sum(map(_nbytes, tensors))


def _nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes that are read of a tensor: one value of a dimension that is expanded."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()
