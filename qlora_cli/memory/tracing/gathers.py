"""The buffers of a sharded base: what PyTorch's `fully_shard` allocates and releases around each unit that computes.

A unit is a layer, the embedding or the head: its weights are gathered from all processes before it computes, forward
and backward, into one buffer, and copied from there into the weights. Where that happens is read from
`torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py`, with its defaults: the buffer of a forward pass lives
until the next unit is gathered, and the next unit of a backward pass is gathered while one computes. Shards that are
kept on the host are copied to the device one weight after another, and from there into the buffer, before any is
released (`_get_param_all_gather_inputs` in `_fsdp_collectives.py`). What is trained is not sharded, and its gradients
pass by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.memory.tracing.kernels import GATHER_BUFFERS, GATHERED
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.quantization.sharded_units import ends_of, layers_of


class Unit:
    """A module whose weights are gathered together.

    Attributes:
        sizes: The bytes of each weight, in as many equal parts as there are processes.
        buffer: The storage that was gathered into, until it was copied from; None for none.
        weights: The storages of the gathered weights; none while it is sharded.
    """

    def __init__(self, module: nn.Module, num_processes: int) -> None:
        self.module = module
        self.sizes = [
            padded_bytes(parameter, num_processes) for parameter in module.parameters() if not parameter.requires_grad
        ]
        self.buffer: int | None = None
        self.weights: list[int] = []


def padded_bytes(parameter: torch.Tensor, num_processes: int) -> int:
    """Return the bytes of a weight whose rows are divided among processes, each of which has as many as the first."""
    rows = -(-parameter.shape[0] // num_processes) * num_processes
    return rows * parameter[:1].numel() * parameter.element_size()


class Gathers:
    """The units of a model, and when their weights are gathered and released."""

    def __init__(
        self, trace: MemoryTrace, base: PreTrainedModel, num_processes: int, *, from_host: bool = False
    ) -> None:
        """Gather the units of `base` from `num_processes`, which keep their shards on the device or the host."""
        self._trace = trace
        self._num_processes = num_processes
        self._from_host = from_host
        embedding, head = ends_of(base)
        self._layers = [Unit(layer, num_processes) for layer in layers_of(base)]
        self._embedding = None if embedding is None else Unit(embedding, num_processes)
        self._head = None if head is None else Unit(head, num_processes)
        self._units = [*([] if self._embedding is None else [self._embedding]), *self._layers]
        self._last: int | None = None  # the buffer of a forward pass from which weights were copied last
        self._in_order: list[Unit] = []  # of a forward pass, those whose backward pass is to come

    def before_marks(self) -> list[Any]:
        """Register the hooks that come before those that mark the parts of a trace, and return them."""
        return [unit.module.register_forward_hook(self._reshard_after(unit)) for unit in self._units]

    def after_marks(self, backbone: nn.Module) -> list[Any]:
        """Register the hooks that come after those, and return them."""
        hooks: list[Any] = []
        for unit in self._units:
            hooks.append(unit.module.register_forward_pre_hook(self._gather_before(unit), with_kwargs=True))
            hooks.append(unit.module.register_forward_hook(self._watch_gradient(unit)))
        hooks.append(backbone.register_forward_hook(lambda *_: self._release_last()))
        return hooks

    @contextmanager
    def head(self) -> Iterator[None]:
        """Gather the head within the context."""
        if self._head is None:
            yield
            return
        self._start(self._head, GATHERED)  # outside of a forward pass, in the memory of the computation's own stream
        self._finish(self._head, in_forward=False)
        yield
        self._reshard(self._head)

    def end_backward(self) -> None:
        """Release what is left at the end of a backward pass: of the first layer, and what was gathered in vain."""
        for unit in self._units:
            self._reshard(unit)
            if unit.buffer is not None:
                self._trace.free_temporary(unit.buffer)
                unit.buffer = None
        self._in_order.clear()

    def _gather_before(self, unit: Unit) -> Any:
        def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._trace.in_autograd_thread:  # the weights of a layer that is recomputed are there
                return
            self._start(unit)
            self._finish(unit, in_forward=True)
            states = args[0] if args else kwargs.get("hidden_states")
            if isinstance(states, torch.Tensor) and states.requires_grad and torch.is_grad_enabled():
                states.register_hook(lambda _: self._reshard(unit))  # type: ignore[no-untyped-call]

        return gather

    def _reshard_after(self, unit: Unit) -> Any:
        def reshard(*_: Any) -> None:
            if not self._trace.in_autograd_thread:
                self._reshard(unit)

        return reshard

    def _watch_gradient(self, unit: Unit) -> Any:
        def watch(_: nn.Module, __: Any, output: Any) -> None:
            if self._trace.in_autograd_thread or not torch.is_grad_enabled():
                return
            self._in_order.append(unit)
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, torch.Tensor) and states.requires_grad and unit in self._layers:
                states.register_hook(lambda _: self._gather_backward(unit))  # type: ignore[no-untyped-call]

        return watch

    def _gather_backward(self, unit: Unit) -> None:
        self._start(unit)
        self._finish(unit, in_forward=False)
        at = self._in_order.index(unit)
        del self._in_order[at:]
        if self._in_order:
            self._start(self._in_order[-1])

    def _start(self, unit: Unit, label: str = GATHER_BUFFERS) -> None:
        if unit.buffer is not None or unit.weights:
            return
        copied = unit.sizes if self._from_host else []
        copies = [self._trace.allocate_temporary(size // self._num_processes, label) for size in copied]
        unit.buffer = self._trace.allocate_temporary(sum(unit.sizes), label)
        for number in copies:
            self._trace.free_temporary(number)

    def _finish(self, unit: Unit, *, in_forward: bool) -> None:
        if unit.buffer is None:
            return
        if in_forward:
            self._release_last()
        unit.weights = [self._trace.allocate_temporary(size, GATHERED) for size in unit.sizes]
        if in_forward:
            self._last = unit.buffer
        else:
            self._trace.free_temporary(unit.buffer)
        unit.buffer = None

    def _release_last(self) -> None:
        if self._last is not None:
            self._trace.free_temporary(self._last)
            self._last = None

    def _reshard(self, unit: Unit) -> None:
        for number in unit.weights:
            self._trace.free_temporary(number)
        unit.weights = []
