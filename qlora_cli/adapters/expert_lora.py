"""LoRA on fused experts that are quantized: PEFT's wrapper of a parameter, mended, and put on in plain order."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.quantization.methods import restores_weight, stored_weight
from qlora_cli.quantization.methods.skip_modules import fused_experts
from qlora_cli.quantization.storage_plan import build_on_meta


class ParamWrapper(layer.ParamWrapper):  # type: ignore[misc]
    """Adds its update to a weight that a parametrization dequantizes, for the length of one forward pass.

    PEFT 0.21 registers the update as a second parametrization, and reads the weight to do so. Where wrappers are
    nested, as for two weights of one module, the outer one has turned the cache of parametrizations on by then: the
    pass continues with the weight as it was read, and the inner update has no effect and never trains. Nor is it taken
    away again (PEFT looks for a class that it no longer uses for experts): every step would add one more.

    PEFT knows its wrappers by the name of their class, so this one has the same.
    """

    def get_param(self) -> torch.Tensor:
        """Return what has shape, dtype and device of the weight; the weight itself would be dequantized for it."""
        chain = self._quantized()
        if chain is None:
            unquantized: torch.Tensor = super().get_param()
            return unquantized
        stored = stored_weight(self.get_base_layer(), self.parameter_name, chain.original)
        return torch.empty((), dtype=stored.dtype, device=chain.original.device).expand(stored.shape)

    def _quantized(self) -> Any:
        """Return what the weight is stored as, a list of parametrizations; None if it is not quantized."""
        chain = dict(getattr(self.get_base_layer(), "parametrizations", {})).get(self.parameter_name)
        return chain if chain is not None and restores_weight(chain[0]) else None

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        chain = self._quantized()
        if chain is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        assert len(chain) == 1, "an update was left on"
        for adapter in active_adapters:
            if adapter in self.lora_A:
                chain.append(_Update(*self.get_delta_factors(adapter)))
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            del chain[1:]


class _Update(nn.Module):
    """Adds `scale * left @ right`, `(num_experts, …, …)`, to a weight."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        super().__init__()
        self._left, self._right, self._scale = left, right, scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the update."""
        # It would change the dtype, which stays that of the base; the meta device has none, and refuses the word.
        with nullcontext() if weight.device.type == "meta" else torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, self._left, self._right, alpha=self._scale)


class _Placed(str):
    """A name that sorts by its place among others."""

    place: int

    def __lt__(self, other: str) -> bool:
        return self.place < other.place if isinstance(other, _Placed) else str(self) < other


def use_for_quantized_experts(config: LoraConfig, model: PreTrainedModel) -> None:
    """Make `config` wrap the quantized experts of `model` so, by the door PEFT has for layers of others."""
    wrapped: dict[type[nn.Module], Any] = {
        # A parametrized module has a class of its own, made from its original one.
        type(module).__bases__[0]: ParamWrapper
        for module in model.modules()
        if any(
            restores_weight(parametrization)
            for chain in getattr(module, "parametrizations", {}).values()
            for parametrization in chain
        )
    }
    if not wrapped:
        return
    config._register_custom_module(wrapped)
    # Among what holds a fused weight is a module of its name, which may be that of a linear layer: down_proj.
    config.exclude_modules = _also_excluding(r".*\.parametrizations\..*", config.exclude_modules)
    if config.target_parameters:
        config.target_parameters = _in_plain_order(config.target_parameters, model)


def _also_excluding(pattern: str, excluded: Iterable[str] | str | None) -> str:
    """Return one pattern for the modules of `pattern` and those that are excluded: a pattern, or ends of names."""
    if not excluded:
        return pattern
    if not isinstance(excluded, str):
        excluded = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})"
    return f"(?:{excluded})|(?:{pattern})"


def _in_plain_order(targets: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Return the full names that `targets` are the ends of, which PEFT will sort as they come in an unquantized model.

    Wrappers of two parameters of one module are nested, and keys of an adapter say how deep, not which parameter.
    PEFT goes by the order of the parameters; where they are parametrized, by that of the alphabet, and full names.
    An adapter would have its two halves swapped on the other kind of base.
    """
    names = [name for name, _ in fused_experts(build_on_meta(model.config, model.dtype))]
    ends = tuple(f".{target}" for target in targets)
    found: list[str] = []
    for place, name in enumerate(names):
        if f".{name}".endswith(ends):
            placed = _Placed(name)
            placed.place = place
            found.append(placed)
    return found
