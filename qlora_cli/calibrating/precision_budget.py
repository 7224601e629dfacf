"""Keep the layers unquantized whose quantization costs predictions most for the memory that it saves."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import PreTrainedModel

from qlora_cli.calibrating.divergence_parts import LayerPart, parts_of_divergence
from qlora_cli.calibrating.prediction_error import UnquantizedPredictions
from qlora_cli.errors import ModelError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.quantization.inventory import take_inventory
from qlora_cli.quantization.load_report import KeptPrecision
from qlora_cli.quantization.methods.four_bit_quantizer import QloraConfig
from qlora_cli.quantization.storage_plan import StoragePlan, plan_layout
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import format_bytes

SKIPPED = "quantization.skip_modules"
SETTING = "load.memory_budget"


def check_budget(budget_bytes: int, load_plan: LoadPlan) -> None:
    """Check that a budget leaves a choice: it suffices for the quantized weights, and not for all as they were.

    Raises:
        ModelError: it does not.
    """
    name, takes = load_plan.source.base_name, load_plan.layout.inventory.total_bytes
    whole = takes + sum(load_plan.layout.extra_bytes.values())
    if takes > budget_bytes:
        raise ModelError(
            f"{format_bytes(budget_bytes)} are less than the {format_bytes(takes)} that {name} takes with every layer "
            "quantized",
            hint="Allow more, or take a smaller model.",
            setting=SETTING,
        )
    if whole <= budget_bytes:
        raise ModelError(
            f"{format_bytes(budget_bytes)} suffice for every layer of {name} unquantized, {format_bytes(whole)}",
            hint="Leave the budget out, and use --quant none.",
            setting=SETTING,
        )


def keep_precision(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions, budget_bytes: int, reporter: Reporter
) -> tuple[LoadedModel, KeptPrecision]:
    """Return the model with layers unquantized that were quantized, as many as `budget_bytes` of weights allow.

    They are chosen by the predictions `exact` of the unquantized model. The modules of `loaded` are replaced.
    """
    reporter.report(PhaseStarted(title="Measuring what each layer costs"))
    mean_kl, parts = parts_of_divergence(loaded, load_plan, exact)
    chosen = choose(parts, budget_bytes - loaded.inventory.total_bytes)
    kept = with_layers(loaded, load_plan, exact, [part.name for part in chosen])
    return kept, KeptPrecision(
        budget_bytes=budget_bytes,
        extra_bytes=kept.inventory.total_bytes - loaded.inventory.total_bytes,
        num_layers=len(parts),
        modules=tuple(part.name for part in chosen),
        mean_kl_quantized=mean_kl,
        expected_kl=max(0.0, mean_kl - sum(part.mean_kl for part in chosen)),
    )


def choose(parts: Iterable[LayerPart], spare_bytes: int) -> list[LayerPart]:
    """Return the layers with the largest parts for their bytes that fit into `spare_bytes`, by name."""
    chosen = []
    for part in sorted(parts, key=lambda part: (-part.mean_kl / part.extra_bytes, part.name)):
        if part.mean_kl > 0 and part.extra_bytes <= spare_bytes:
            chosen.append(part)
            spare_bytes -= part.extra_bytes
    return sorted(chosen, key=lambda part: part.name)


def with_layers(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions, names: list[str]
) -> LoadedModel:
    """Return the model with the layers `names` unquantized, as if it had been loaded so."""
    if not names:
        return loaded
    model, dtype = loaded.base, load_plan.layout.dtype
    for name in names:
        if name in loaded.layout.experts:
            _put_unquantized_experts(model, name, exact.read(name).to(loaded.device, dtype))
        else:
            model.set_submodule(name, _unquantized_layer(load_plan, exact, name, model.get_submodule(name)))
    skipped = (*(loaded.settings.quantization.skip_modules or ()), *names)
    settings = with_settings(loaded.settings, {SKIPPED: skipped})
    layout = plan_layout(load_plan.shapes, settings.quantization, dtype, device=loaded.device)
    _record_in_config(model, layout)
    errors = loaded.errors
    if errors is not None:
        errors = {weight: error for weight, error in errors.items() if weight.removesuffix(".weight") not in names}
    inventory = take_inventory(model, layout.unquantized)
    return replace(loaded, settings=settings, layout=layout, inventory=inventory, errors=errors)


def _record_in_config(model: PreTrainedModel, layout: StoragePlan) -> None:
    """Name in the config of `model` what is quantized, as loading does."""
    stored = model.config.quantization_config
    stored.llm_int8_skip_modules = sorted(layout.unquantized)
    if isinstance(stored, QloraConfig):
        stored.quantized_parameters = list(layout.experts)
        model.config.quantization_config = stored if layout.experts else stored.plain()


def _put_unquantized_experts(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    """Put `weight` in the place of the fused weight `name` of experts, which was quantized."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    remove_parametrizations(module, leaf, leave_parametrized=False)
    setattr(module, leaf, nn.Parameter(weight, requires_grad=False))


def _unquantized_layer(
    load_plan: LoadPlan, exact: UnquantizedPredictions, name: str, quantized: nn.Module
) -> nn.Module:
    layer, weight = deepcopy(load_plan.shapes.get_submodule(name)), exact.read(f"{name}.weight")
    bias = quantized.bias
    held = bias.device if isinstance(bias, torch.Tensor) else quantized.get_parameter("weight").device
    layer.weight = nn.Parameter(weight.to(held, load_plan.layout.dtype), requires_grad=False)
    layer.bias = bias
    return layer.eval()
