"""Whether each adapted module, merged, computes what it computes with the adapter on it.

Both get the same input: the one that reaches the module while the model runs. So the errors of the layers before do
not add up, however deep the model is, and what lies between the two can be held against what the adapter does there,
however little that is: a missing update is all of it, a doubled one as much again.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.func import functional_call

from qlora_cli.adapters.keys import in_base
from qlora_cli.merging.merge_result import ModuleCheck
from qlora_cli.merging.planning.adapter_changes import Read

# Of what the adapter does. A doubled update, or one that is missing, is all of it.
MAX_MODULE_DIFFERENCE = 1e-2
# Of the module's output, added to the effect: fp32 sums differ by up to 1e-6 of it, whatever the adapter does.
LEAST_EFFECT = 1e-3

Place = Callable[[torch.Tensor, str], torch.Tensor]


class ModuleWatch:
    """Compares the adapted modules of a model while it runs; `merged` reads merged parameters, in fp32."""

    def __init__(self, merged: Read) -> None:
        self._merged = merged
        self._found: dict[str, float] = {}

    def attach(self, model: nn.Module, names: Mapping[int, str], place: Place) -> None:
        """Watch the adapted modules of `model`.

        `names` are those of the base's parameters by their identity; `place` puts a value where the model computes.
        """
        for path, module in adapted_modules(model):
            inner = _without_adapter(module)
            is_whole = isinstance(module, AuxiliaryTrainingWrapper)
            leaves = {
                leaf: names[id(parameter)]
                for leaf, parameter in inner.named_parameters(recurse=is_whole)
                if id(parameter) in names
            }
            module.register_forward_hook(partial(self._compare, in_base(path), inner, leaves, place), with_kwargs=True)

    def _compare(
        self,
        name: str,
        inner: nn.Module,
        leaves: Mapping[str, str],
        place: Place,
        module: nn.Module,
        args: tuple[Any, ...],
        options: dict[str, Any],
        adapted: Any,
    ) -> None:
        del module
        if not isinstance(adapted, torch.Tensor):
            return
        alone = inner(*args, **options)
        effect, size = _norm(adapted - alone), _norm(adapted)
        del alone
        values = {leaf: place(self._merged(parameter), parameter) for leaf, parameter in leaves.items()}
        merged = functional_call(inner, values, args, options)
        difference = _norm(merged - adapted) / max(effect + LEAST_EFFECT * size, torch.finfo(torch.float32).tiny)
        self._found[name] = max(self._found.get(name, 0.0), difference, key=_nan_last)

    def check(self) -> ModuleCheck | None:
        """Return what was found; None if no adapted module has run."""
        if not self._found:
            return None
        worst = max(self._found, key=lambda name: _nan_last(self._found[name]))
        return ModuleCheck(
            num_modules=len(self._found),
            worst=worst,
            difference=self._found[worst],
            max_difference=MAX_MODULE_DIFFERENCE,
            floor=MAX_MODULE_DIFFERENCE * LEAST_EFFECT,
        )


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that stand in for one of the base, by their paths; of those in each other the outermost."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside or not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        inside |= {id(below) for below in _inside(module)}
        yield path, module


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are the same module of the base, adapted by less."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from module.modules()
    elif isinstance(module, BaseTunerLayer):
        below = module.base_layer
        while isinstance(below, BaseTunerLayer):
            yield below
            below = below.base_layer


def _without_adapter(module: nn.Module) -> nn.Module:
    if isinstance(module, AuxiliaryTrainingWrapper):
        original: nn.Module = module.original_module
        return original
    assert isinstance(module, BaseTunerLayer), "there is no third kind"
    base: nn.Module = module.get_base_layer()
    return base


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _nan_last(value: float) -> float:
    return value if value == value else float("inf")
