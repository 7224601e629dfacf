"""LoRA on quantized fused experts: PEFT's parameter wrapper, corrected, and applied in a fixed order."""

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
    """Adds its update to a weight that a parametrization dequantizes, for the duration of one forward pass.

    PEFT 0.21 registers the update as a second parametrization, and reads the weight to do so. If wrappers are nested,
    as for two weights of one module, the outer one has enabled the parametrization cache by then: the pass continues
    with the cached weight, and the inner update has no effect and is never trained. Nor is it removed (PEFT looks for
    a class that it no longer uses for experts): every step would add another.

    PEFT recognises its wrappers by the name of their class, so this one has the same.
    """

    def get_param(self) -> torch.Tensor:
        """Return a placeholder with the weight's shape, dtype and device, without dequantizing the weight."""
        chain = self._quantized()
        if chain is None:
            unquantized: torch.Tensor = super().get_param()
            return unquantized
        stored = stored_weight(self.get_base_layer(), self.parameter_name, chain.original)
        return torch.empty((), dtype=stored.dtype, device=chain.original.device).expand(stored.shape)

    def _quantized(self) -> Any:
        """Return the weight's list of parametrizations; None if it is not quantized."""
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
        # Autocast would change the dtype, which stays that of the base; it does not accept the meta device.
        with nullcontext() if weight.device.type == "meta" else torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, self._left, self._right, alpha=self._scale)


class _OrderedName(str):
    """A name that sorts by its index in a list."""

    order: int

    def __lt__(self, other: str) -> bool:
        return self.order < other.order if isinstance(other, _OrderedName) else str(self) < other


def expert_wrappers(config: LoraConfig, model: PreTrainedModel) -> dict[type[nn.Module], type[nn.Module]]:
    """Return `ParamWrapper` for each type of the quantized experts of `model`, as custom modules of PEFT.

    `config` is adapted to them.
    """
    wrappers: dict[type[nn.Module], type[nn.Module]] = {
        # A parametrized module has a class of its own, made from its original one.
        type(module).__bases__[0]: ParamWrapper
        for module in model.modules()
        if any(
            restores_weight(parametrization)
            for chain in getattr(module, "parametrizations", {}).values()
            for parametrization in chain
        )
    }
    if wrappers:
        # The parametrizations of a fused weight are in a module of its name, which a linear layer may have: down_proj.
        config.exclude_modules = _also_excluding(r".*\.parametrizations\..*", config.exclude_modules)
        if config.target_parameters:
            config.target_parameters = _in_model_order(config.target_parameters, model)
    return wrappers


def _also_excluding(pattern: str, excluded: Iterable[str] | str | None) -> str:
    """Return a pattern that matches `pattern` and `excluded`, which is a pattern itself or a list of suffixes."""
    if not excluded:
        return pattern
    if not isinstance(excluded, str):
        excluded = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})"
    return f"(?:{excluded})|(?:{pattern})"


def _in_model_order(targets: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Return the full names with the suffixes `targets`, which PEFT then sorts in the order of an unquantized model.

    Wrappers of two parameters of one module are nested, and an adapter's keys tell the depth, not the parameter.
    PEFT nests them in the order of the parameters, but parametrized ones alphabetically by full name. The two
    halves of an adapter would be swapped on the other kind of base.
    """
    names = [name for name, _ in fused_experts(build_on_meta(model.config, model.dtype))]
    ends = tuple(f".{target}" for target in targets)
    ordered: list[str] = []
    for index, name in enumerate(names):
        if f".{name}".endswith(ends):
            ordered_name = _OrderedName(name)
            ordered_name.order = index
            ordered.append(ordered_name)
    return ordered
