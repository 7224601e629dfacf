"""Results of operators on the meta device, each derived once for arguments of the same shapes, strides and dtypes.

PyTorch derives most of them in Python, by decompositions that take a hundred times as long as to make the tensor.
Layers of a kind, and the passes of a step, ask for the same ones again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# What a result may depend on besides tensors; values that are equal and of one type give the same result.
CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class _NewTensor:
    """A result with a storage of its own."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


class MetaResults:
    """The results of the operators of one trace.

    Remembered are new tensors, and that an operator returns its first argument, changed in place. For all else the
    operator is called: for views, on other devices, and on complex numbers, which may be stored as their conjugates.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[_NewTensor, ...] | _NewTensor | None] = {}
        self._not_remembered: set[Any] = set()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `func`, an operator, returns."""
        key: list[Any] = [func, *kwargs]
        if func in self._not_remembered or not (_describe(args, key) and _describe(kwargs.values(), key)):
            return func(*args, **kwargs)
        asked = tuple(key)
        if asked not in self._known:
            return self._remember(asked, func, args, kwargs)
        known = self._known[asked]
        if known is None:
            return args[0]
        return known.make() if isinstance(known, _NewTensor) else tuple(part.make() for part in known)

    def _remember(self, asked: tuple[Any, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        taken = {storage_address(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        if args and result is args[0] and torch.Tag.inplace_view not in func.tags:
            self._known[asked] = None
        elif isinstance(result, torch.Tensor) and _is_new(result, taken):
            self._known[asked] = _form(result)
        elif type(result) is tuple and all(isinstance(part, torch.Tensor) and _is_new(part, taken) for part in result):
            self._known[asked] = tuple(map(_form, result))
        else:
            self._not_remembered.add(func)
        return result


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of the implementation of a tensor's storage: tensors that share it are one allocation."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _describe(values: Iterable[Any], key: list[Any]) -> bool:
    """Append to `key` what results depend on; return whether that is all."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if not value.is_meta or value.is_complex():
                return False
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype)
        elif isinstance(value, list | tuple):
            key += (list, len(value))
            if not _describe(value, key):
                return False
        elif isinstance(value, CONSTANTS):
            key += (type(value), value)
        else:
            return False
    return True


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_new(tensor: torch.Tensor, taken: set[int]) -> bool:
    """Whether a tensor is as its form makes it, in a storage that is not `taken`; afterwards it is."""
    is_new = tensor.is_meta and not tensor.is_complex() and storage_address(tensor) not in taken
    taken.add(storage_address(tensor))
    num_bytes = tensor.untyped_storage().nbytes()
    return is_new and tensor.storage_offset() == 0 and _form(tensor).make().untyped_storage().nbytes() == num_bytes


def _form(tensor: torch.Tensor) -> _NewTensor:
    return _NewTensor(tensor.shape, tensor.stride(), tensor.dtype)
