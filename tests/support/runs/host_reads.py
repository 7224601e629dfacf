"""What makes the host wait for a GPU, counted in a run on a CPU: values of tensors there that the host reads."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

OPERATIONS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"),
    *("aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::repeat_interleave.Tensor"),
}
INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class HostReads:
    """Counts reads of tensors that would be on a GPU, by the file and function that reads.

    Those are the tensors that `mark` was given, and what is computed from them.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._marked: dict[int, weakref.ref[Any]] = {}

    def mark(self, values: Any) -> None:
        """Count reads of every tensor in `values`, which may be nested."""
        for tensor in tree_iter(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._marked[storage._cdata] = weakref.ref(storage)

    def has_marked(self, values: Any) -> bool:
        """Return whether one of the tensors in `values` is marked."""
        return any(isinstance(one, torch.Tensor) and self._is_marked(one) for one in tree_iter(values))

    def _is_marked(self, tensor: torch.Tensor) -> bool:
        known = self._marked.get(tensor.untyped_storage()._cdata)
        return known is not None and known() is not None

    def count(self) -> None:
        """Count a read by the innermost function that is neither PyTorch's nor of this file."""
        frame = sys._getframe(1)
        while Path(frame.f_code.co_filename).parts[-2] == "runs" or "/torch/" in frame.f_code.co_filename:
            assert frame.f_back is not None
            frame = frame.f_back
        self.counts[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in this context."""
        with _Operations(self), _Methods(self):
            yield


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, reads: HostReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if self._reads.has_marked((args, kwargs)):
            self._reads.mark(result)  # results that an operation writes to are among them
            if operation.name() in OPERATIONS or (operation.name() in INDEXING and _is_mask(args[1])):
                self._reads.count()
        return result


class _Methods(TorchFunctionMode):
    """Sees the methods of which a tensor on the CPU needs no operation."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METHODS and self._reads.has_marked(args[0]):
            self._reads.count()
        return function(*args, **(kwargs or {}))


def _is_mask(indices: Any) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
