"""Record when the memory of each tensor is allocated and released, while real code runs on tensors without data.

On the meta device tensors have shapes, dtypes, strides and autograd history, but no bytes. A dispatch mode sees every
operation below autograd, as the GPU would: a new storage is an allocation, the loss of its last reference a release.
"""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_cli.memory.tracing.kernels import CUBLAS, WORKSPACES, Kernels
from qlora_cli.memory.tracing.meta_results import Asked, storage_address
from qlora_cli.memory.tracing.passes import TracedStorage

READ_VALUE = torch.ops.aten._local_scalar_dense.default
ACTIVATIONS = "activations"
# Functions of transformers that branch on a tensor's value: whether no sequence is packed, or no row is padded.
NOT_PACKED = ("find_packed_sequence_indices",)
NOT_PADDED = ("_ignore_causal_mask_sdpa", "flash_attention_mask")
Observer = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, Asked | None], None]
MAX_FRAMES = 12  # from the operator up to one of those functions


@dataclass(slots=True)
class Segment:
    """Events between two marks: `n` is the allocation of storage `n`, `~n` its release."""

    mark: tuple[Any, ...]
    events: list[int] = field(default_factory=list)


class MemoryTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records allocations and releases of storages, in segments.

    Attributes:
        storages: Every storage seen, by number.
        segments: Their allocations and releases, in order.
        observer: What is called with each operation, its arguments, its result and what that follows from, as in
            `MetaResults`; None for nothing.
    """

    def __init__(
        self, kernels: Kernels, branches: Mapping[str, bool] | None = None, *, device_type: str = "meta"
    ) -> None:
        """Record only storages on devices of `device_type`.

        `branches` has, by the name of a function, the branch that it takes where it reads a tensor without data.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type
        self.storages: list[TracedStorage] = []
        self.segments: list[Segment] = [Segment(("start", "head"))]
        self.label = ACTIVATIONS
        self.in_autograd_thread = False
        self.observer: Observer | None = None
        self._kernels = kernels
        self._branches = {**dict.fromkeys((*NOT_PACKED, *NOT_PADDED), True), **(branches or {})}
        self._live: dict[int, tuple[int, Any]] = {}  # by the address of the storage
        self._have_workspace: set[bool] = set()

    def mark(self, *mark: Any) -> None:
        """Begin a new segment."""
        self.segments.append(Segment(mark))

    def record(self, tensor: torch.Tensor) -> int:
        """Record the storage of `tensor` as allocated now, if it is new; return its number."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[0]
        number, num_bytes = len(self.storages), storage.nbytes()
        self.storages.append(TracedStorage(num_bytes, self.label))
        if num_bytes:
            self.segments[-1].events.append(number)
        self._live[key] = (number, weakref.ref(storage, self._on_release(key, number)))
        return number

    def ignore(self, tensor: torch.Tensor) -> None:
        """Exclude the storage of `tensor`, which is accounted for elsewhere."""
        storage, key = tensor.untyped_storage(), storage_address(tensor)
        self._live[key] = (-1, weakref.ref(storage, self._on_release_of_ignored(key)))

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Change the label of a recorded storage, once its purpose is known."""
        known = self._live.get(storage_address(tensor))
        if known is not None and known[0] >= 0:
            self.storages[known[0]].label = label

    def add_storage(self, num_bytes: int, label: str) -> int:
        """Add a storage that belongs to no tensor, without an event; return its number."""
        self.storages.append(TracedStorage(num_bytes, label))
        return len(self.storages) - 1

    def allocate_temporary(self, num_bytes: int, label: str) -> int:
        """Record memory of a kernel that belongs to no tensor, until `free_temporary`; return its number."""
        number = self.add_storage(num_bytes, label)
        self.segments[-1].events.append(number)
        return number

    def free_temporary(self, number: int) -> None:
        """Record the release of an `allocate_temporary`."""
        self.segments[-1].events.append(~number)

    def _on_release(self, key: int, number: int) -> Callable[[Any], None]:
        def released(_: Any) -> None:
            self._live.pop(key, None)
            if self.storages[number].num_bytes:
                self.segments[-1].events.append(~number)

        return released

    def _on_release_of_ignored(self, key: int) -> Callable[[Any], None]:
        def released(_: Any) -> None:
            self._live.pop(key, None)

        return released

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Function modes act above autograd: what is computed here is not autocast again.
        with torch._C.DisableTorchFunction():
            reads_value = func is READ_VALUE
            result = self._scalar_of(args[0]) if reads_value else self._run(func, args, kwargs)
            if self.observer is not None:
                self.observer(func, args, kwargs, result, None if reads_value else self._kernels.asked)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        temporaries = self._kernels.temporaries(func, args, kwargs)
        if temporaries is None:
            result = self._kernels.run(func, args, kwargs)
            self._record_all(result)
            return result
        before = [self.allocate_temporary(size, WORKSPACES) for size in temporaries.before]
        result = self._kernels.run(func, args, kwargs)
        self._record_all(result)
        if temporaries.uses_cublas and self.in_autograd_thread not in self._have_workspace:
            # Each thread has its own handle of cuBLAS, and autograd runs the backward pass in a separate thread.
            self._have_workspace.add(self.in_autograd_thread)
            self.allocate_temporary(1, CUBLAS)
        after = [self.allocate_temporary(size, WORKSPACES) for size in temporaries.after]
        for number in (*before, *after):
            self.free_temporary(number)
        return result

    def _record_all(self, result: Any) -> None:
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type == self._device_type:
                self.record(value)

    def _scalar_of(self, tensor: torch.Tensor) -> bool | float | int:
        """Return the value that code reads from a tensor; on the meta device, a made-up one.

        A boolean decides which branch the code takes. The branch that it would take on data depends on the function
        that asks, so the nearest known caller decides.
        """
        if tensor.device.type != "meta":
            value: bool | float | int = tensor.detach().numpy().item()
            return value
        if tensor.dtype != torch.bool:
            return 1.0 if tensor.is_floating_point() else 1
        frame = sys._getframe(2)
        for _ in range(MAX_FRAMES):
            if frame.f_code.co_name in self._branches:
                return self._branches[frame.f_code.co_name]
            if frame.f_back is None:
                break
            frame = frame.f_back
        return True
