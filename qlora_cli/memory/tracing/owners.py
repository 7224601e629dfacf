"""Follow which module computes: by hooks in the forward pass and its recomputation, by nodes of autograd backward."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.timing.operation import OperationKind

OWNER = "owner"  # the key in the metadata of an autograd node


@dataclass(frozen=True, slots=True)
class Owner:
    """The module that an operation belongs to; `width` is the smaller side of its weight, if it is a linear layer."""

    kind: OperationKind
    width: int = 0


NO_MODULE = Owner(OperationKind.LOSS)  # no module computes the loss


class Owners:
    """Follows which module computes while a step is traced."""

    def __init__(self, trace: MemoryTrace) -> None:
        self._trace = trace
        self._entered: list[Owner] = []
        self._of_node = NO_MODULE

    @property
    def is_recomputing(self) -> bool:
        """Whether a module computes within the backward pass."""
        return self._trace.in_autograd_thread and bool(self._entered)

    @property
    def current(self) -> Owner:
        """The owner of the next operation."""
        if self._entered:
            return self._entered[-1]
        return self._of_node if self._trace.in_autograd_thread else NO_MODULE

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
        """Note the owner of each node that led to the tensors and has none yet, if anyone asks for it."""
        if self._trace.observer is None:
            return
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


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or results of a module."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _owner(module: nn.Module, base: Any) -> Owner | None:
    """Return the owner of what `module` itself computes; None if that is the module around it."""
    if module is base.get_output_embeddings():
        return Owner(OperationKind.LOSS)
    if module is base.base_model:
        return Owner(OperationKind.OTHER)
    if isinstance(module, LoraLayer):
        return Owner(OperationKind.LORA, min(module.in_features, module.out_features))
    if isinstance(module, nn.Linear | Conv1D):
        return Owner(OperationKind.BASE_GEMM, min(module.weight.shape))
    name = type(module).__name__
    return next((Owner(kind) for end, kind in NAMES.items() if name.endswith(end)), None)


# How the classes of transformers end, whatever the family.
NAMES = {
    "Norm": OperationKind.NORM,
    "RotaryEmbedding": OperationKind.ROPE,
    "Attention": OperationKind.ROPE,  # what an attention layer computes besides products and the attention itself
    "MLP": OperationKind.MLP,
    "Experts": OperationKind.MLP,
    "DecoderLayer": OperationKind.RESIDUAL,
    "Embedding": OperationKind.EMBEDDING,
}
