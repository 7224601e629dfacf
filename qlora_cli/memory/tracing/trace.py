"""Record when the memory of each tensor is taken and given back, while real code runs on tensors without data.

On the meta device tensors have shapes, dtypes, strides and autograd history, but no bytes. A dispatch mode sees every
operation below autograd, as the GPU would: each new storage is a birth, its last reference going away a death.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_cli.memory.tracing.kernels import CUBLAS, WORKSPACES, Kernels
from qlora_cli.memory.tracing.passes import TracedStorage

aten = torch.ops.aten
ACTIVATIONS = "activations"
# Functions of transformers that ask a tensor for a truth: whether no sequence is packed, and whether no row is padded.
NOT_PACKED = ("find_packed_sequence_indices",)
NOT_PADDED = ("_ignore_causal_mask_sdpa", "flash_attention_mask")
MOST_FRAMES = 12


@dataclass(slots=True)
class Segment:
    """Events between two marks: `n` is the birth of storage `n`, `~n` its death."""

    mark: tuple[Any, ...]
    events: list[int] = field(default_factory=list)


class MemoryTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records births and deaths of storages, in segments.

    Attributes:
        storages: Every storage seen, by number.
        segments: What happened to them, in order.
    """

    def __init__(
        self, kernels: Kernels, answers: Mapping[str, bool] | None = None, *, device_type: str = "meta"
    ) -> None:
        """`answers` are what code that asks a tensor without data is told, by function; other devices are not seen."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        self.storages: list[TracedStorage] = []
        self.segments: list[Segment] = [Segment(("start", "head"))]
        self.label = ACTIVATIONS
        self.in_autograd_thread = False
        self._kernels = kernels
        self._answers = {**dict.fromkeys((*NOT_PACKED, *NOT_PADDED), True), **(answers or {})}
        self._live: dict[int, tuple[int, Any]] = {}  # by the address of the storage's implementation
        self._have_workspace: set[bool] = set()

    def mark(self, *mark: Any) -> None:
        """Begin a new segment."""
        self.segments.append(Segment(mark))

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Give what is born within `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def hold(self, tensor: torch.Tensor, label: str | None = None) -> int:
        """Record the storage of `tensor` as born now, if it is new; return its number."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[0]
        number = len(self.storages)
        self.storages.append(TracedStorage(storage.nbytes(), label or self.label))
        if storage.nbytes():
            self.segments[-1].events.append(number)
        self._live[key] = (number, weakref.ref(storage, self._buried(key, number)))
        return number

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave the storage of `tensor` out: it is accounted for elsewhere."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._live[key] = (-1, weakref.ref(storage, self._forgotten(key)))

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Say what an existing storage is for, now that it is known."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        if known is not None and known[0] >= 0:
            self.storages[known[0]].label = label

    def temporary(self, num_bytes: int, label: str | None = None) -> int:
        """Record the birth of memory that no tensor shows: inside a kernel. It lives until `bury`."""
        number = len(self.storages)
        self.storages.append(TracedStorage(num_bytes, label or self.label))
        self.segments[-1].events.append(number)
        return number

    def bury(self, number: int) -> None:
        """Record the death of a `temporary`."""
        self.segments[-1].events.append(~number)

    def _buried(self, key: int, number: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self._live.pop(key, None)
            if self.storages[number].num_bytes:
                self.segments[-1].events.append(~number)

        return died

    def _forgotten(self, key: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self._live.pop(key, None)

        return died

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        inside = self._kernels.inside(func, args, kwargs)
        if inside is None:
            result = self._kernels.run(func, args, kwargs)
            self._hold_all(result)
            return result
        before = [self.temporary(size, WORKSPACES) for size in inside.before]
        result = self._kernels.run(func, args, kwargs)
        self._hold_all(result)
        if inside.uses_cublas and self.in_autograd_thread not in self._have_workspace:
            # One a thread: the handle of cuBLAS is, and autograd runs the backward pass in a thread of its own.
            self._have_workspace.add(self.in_autograd_thread)
            self.temporary(1, CUBLAS)
        after = [self.temporary(size, WORKSPACES) for size in inside.after]
        for number in (*before, *after):
            self.bury(number)
        return result

    def _hold_all(self, result: Any) -> None:
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type == self._device_type:
                self.hold(value)

    def _answer(self, tensor: torch.Tensor) -> bool | float | int:
        """Return the value that code asks a tensor without data for."""
        if tensor.device.type != "meta":
            value: bool | float | int = tensor.detach().numpy().item()
            return value
        if tensor.dtype != torch.bool:
            return 1.0 if tensor.is_floating_point() else 1
        frame = sys._getframe(2)
        for _ in range(MOST_FRAMES):
            if frame.f_code.co_name in self._answers:
                return self._answers[frame.f_code.co_name]
            if frame.f_back is None:
                break
            frame = frame.f_back
        return True
