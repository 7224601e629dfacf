"""Masks and positions on a GPU whose values the host has as well, so that it does not wait to read them.

transformers looks at each batch for a pad token, or for packed rows, to leave a mask out where none is needed. The
host would wait for the GPU to finish all that was started before, and the GPU then for the host. The collator knows
the values; `with_known_values` hands them to transformers together with the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

NAMES = ("attention_mask", "position_ids")
READS = {"__bool__", "__int__", "item", "tolist"}
# What is computed from them before a value is read; computed on the host as well. What else is computed from them is
# not followed: a mask of all queries and keys would take long there.
FOLLOWED = {
    *("to", "__getitem__", "sum", "all", "min", "max", "cumsum", "diff", "sub", "__sub__", "eq", "__eq__", "ne"),
    *("__ne__", "ge", "__ge__", "bitwise_not", "__invert__", "logical_not"),
}


@dataclass(frozen=True, eq=False)
class HostCopies:
    """The values of a batch's masks and positions, by name, which stay on the host when the batch is moved."""

    values: Mapping[str, torch.Tensor]


def host_copies(batch: Mapping[str, Any]) -> HostCopies:
    """Return the masks and positions of a batch that is on the host."""
    return HostCopies({name: batch[name] for name in NAMES if isinstance(batch.get(name), torch.Tensor)})


def with_known_values(batch: Mapping[str, Any], copies: HostCopies) -> dict[str, Any]:
    """Return a batch that was moved, whose masks and positions the host knows."""
    return {**batch, **{name: _known(batch[name], values) for name, values in copies.values.items()}}


class KnownValues(torch.Tensor):
    """A tensor, `plain`, on a device, and its values on the host, `on_host`. What is computed from it is plain."""

    plain: torch.Tensor
    on_host: torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute `func`; on the host instead if it reads a value, and there as well if a value may be read next."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in READS:
            return func(*_on_host(args), **kwargs)
        result = func(*_plain(args), **_plain(kwargs))
        if name not in FOLLOWED or not isinstance(result, torch.Tensor) or not _are_known((args, kwargs)):
            return result
        if name == "to":
            return _known(result, args[0].on_host.to(result.dtype))
        return _known(result, func(*_on_host(args), **_on_host(kwargs)))


def _known(plain: torch.Tensor, on_host: torch.Tensor) -> torch.Tensor:
    known = plain.as_subclass(KnownValues)
    known.plain, known.on_host = plain, on_host
    return known


def _plain(values: Any) -> Any:
    return tree_map(lambda value: value.plain if isinstance(value, KnownValues) else value, values)


def _on_host(values: Any) -> Any:
    return tree_map(lambda value: value.on_host if isinstance(value, KnownValues) else value, values)


def _are_known(values: Any) -> bool:
    return all(isinstance(value, KnownValues) for value in tree_iter(values) if isinstance(value, torch.Tensor))
