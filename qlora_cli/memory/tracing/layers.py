"""Find the stack of a model's layers, distinguish their kinds, and choose a few that represent all.

A step through 80 layers repeats itself. It is traced through the fewest layers in which each kind occurs between all
neighbours that it has in the stack, and extended to the rest (`extension`). No architecture is hard-coded: the kinds
follow from the modules themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PLAIN = (bool, int, float, str, type(None))
NUMBERING = {"layer_idx", "layer_id", "layer_number", "idx", "index"}
EDGE = -1  # the kind of what lies before the first layer and after the last


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """The layers of a model: the name of their `nn.ModuleList`, and the kind of each layer, as a number."""

    path: str
    kinds: tuple[int, ...]


def find_stack(model: PreTrainedModel, marks: Mapping[str, str] | None = None) -> LayerStack | None:
    """Return the stack of `model`; None if its structure does not show one.

    `marks` are further differences between layers, by full module name, such as a module that is not quantized.
    """
    config = model.config.get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(lists) != 1 or _shares_parameters(lists[0][1]):
        return None
    path, stack = lists[0]
    per_layer = _per_layer_lists(config, len(stack))
    numbers: dict[Any, int] = {}
    kinds = []
    for index, layer in enumerate(stack):
        prefix = f"{path}.{index}."
        signature = (
            _structure(layer),
            tuple(repr(values[index]) for values in per_layer.values()),
            tuple(
                (name.removeprefix(prefix), mark) for name, mark in (marks or {}).items() if name.startswith(prefix)
            ),
        )
        kinds.append(numbers.setdefault(signature, len(numbers)))
    return LayerStack(path=path, kinds=tuple(kinds))


def _shares_parameters(stack: nn.ModuleList) -> bool:
    seen: set[int] = set()
    for layer in stack:
        own = {id(parameter) for parameter in layer.parameters()}
        if own & seen:
            return True
        seen |= own
    return False


def _per_layer_lists(config: Any, num_layers: int) -> dict[str, list[Any]]:
    """Return the settings of the config that are lists with an entry for each layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == num_layers and not name.startswith("_")
    }


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """Return the parts of a layer: classes, shapes, and plain attributes except for its number."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(p.shape), str(p.dtype)) for key, p in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, PLAIN) and not key.startswith("_") and key not in NUMBERING
            ),
        )
        for name, module in layer.named_modules()
    )


def representatives(kinds: Sequence[int]) -> list[int]:
    """Return the indices of the fewest layers in which each kind occurs between all neighbours that it has.

    Runs of layers are dropped as long as every context of the stack still occurs.
    """
    chosen = list(range(len(kinds)))
    shrinks = True
    while shrinks:
        shrinks = False
        required = set(contexts(kinds))
        for start in range(len(chosen)):
            for end in range(len(chosen) - 1, start, -1):
                shorter = chosen[:start] + chosen[end:]
                if set(contexts([kinds[i] for i in shorter])) == required:
                    chosen, shrinks = shorter, True
                    break
            if shrinks:
                break
    return chosen


def contexts(kinds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return for each layer the kinds of its predecessor, of itself and of its successor."""
    around = [EDGE, *kinds, EDGE]
    return list(zip(around[:-2], around[1:-1], around[2:], strict=True))


def represented_by(stack: LayerStack, chosen: Sequence[int]) -> list[int]:
    """Return for each layer of `stack` the index in `chosen` of the first layer with the same context."""
    traced = contexts([stack.kinds[index] for index in chosen])
    return [traced.index(context) for context in contexts(stack.kinds)]


def reduce_to(model: PreTrainedModel, stack: LayerStack, chosen: Sequence[int]) -> None:
    """Reduce `model` to the layers `chosen`, and its config's lists with them."""
    config = model.config.get_text_config(decoder=True)
    for name, values in _per_layer_lists(config, len(stack.kinds)).items():
        setattr(config, name, [values[index] for index in chosen])
    config.num_hidden_layers = len(chosen)
    layers = model.get_submodule(stack.path)
    assert isinstance(layers, nn.ModuleList)
    model.set_submodule(stack.path, nn.ModuleList([layers[index] for index in chosen]))


def renamed(name: str, stack: LayerStack, chosen: Sequence[int]) -> str | None:
    """Return the name of the module `name` in a model reduced to the layers `chosen`; None if it was dropped."""
    prefix = f"{stack.path}."
    if not name.startswith(prefix):
        return name
    number, dot, rest = name.removeprefix(prefix).partition(".")
    if not number.isdigit():
        return name
    return f"{prefix}{chosen.index(int(number))}{dot}{rest}" if int(number) in chosen else None
