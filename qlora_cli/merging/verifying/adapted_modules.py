"""Check that each adapted module computes the same merged as with the adapter attached.

Both get the same input, the one that reaches the module while the model runs. So errors of earlier layers do not
accumulate, however deep the model is, and the difference can be compared with the adapter's effect on the module,
however small that is: a missing or doubled update differs by the whole effect.
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

# As a share of the adapter's effect. A doubled or missing update differs by all of it.
MAX_MODULE_DIFFERENCE = 1e-2
# As a share of the module's output, added to the effect: fp32 sums differ by up to 1e-6 of the output.
LEAST_EFFECT = 1e-3

PlaceOnDevice = Callable[[torch.Tensor, str], torch.Tensor]


class ModuleWatch:
    """Compares the adapted modules of a model while it runs; `merged` returns merged parameters in fp32."""

    def __init__(self, merged: Read) -> None:
        self._merged = merged
        self._differences: dict[str, float] = {}

    def attach(self, model: nn.Module, names: Mapping[int, str], place: PlaceOnDevice) -> None:
        """Watch the adapted modules of `model`.

        `names` maps the ids of the base's parameters to names; `place` moves a value to the model's device and dtype.
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
        place: PlaceOnDevice,
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
        self._differences[name] = max(self._differences.get(name, 0.0), difference, key=_nan_last)

    def check(self) -> ModuleCheck | None:
        """Return the result; None if no adapted module has run."""
        if not self._differences:
            return None
        worst = max(self._differences, key=lambda name: _nan_last(self._differences[name]))
        return ModuleCheck(
            num_modules=len(self._differences),
            worst=worst,
            difference=self._differences[worst],
            max_difference=MAX_MODULE_DIFFERENCE,
            floor=MAX_MODULE_DIFFERENCE * LEAST_EFFECT,
        )


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that wrap one of the base, by path; of nested wrappers the outermost."""
    nested: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in nested or not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        nested |= {id(inner) for inner in _nested_wrappers(module)}
        yield path, module


def _nested_wrappers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the wrappers of the same base module within `module`."""
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
    assert isinstance(module, BaseTunerLayer), "there are two kinds of wrappers"
    base: nn.Module = module.get_base_layer()
    return base


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _nan_last(value: float) -> float:
    return value if value == value else float("inf")
