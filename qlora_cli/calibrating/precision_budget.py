"""Keep the layers unquantized whose quantization costs predictions most for the memory that it saves.

Near the unquantized model, the divergence of predictions is a quadratic form of the errors of all weights. Half its
gradient with respect to a weight times that weight's error is the weight's part of the divergence: the parts of all
weights add up to the whole. One pass in both directions has them all, so that no layer needs to be tried.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.calibrating.prediction_error import UnquantizedPredictions
from qlora_cli.errors import ModelError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.quantization.embedding import embedding_of
from qlora_cli.quantization.inventory import take_inventory
from qlora_cli.quantization.load_report import KeptPrecision
from qlora_cli.quantization.methods.skip_modules import linear_layers
from qlora_cli.quantization.storage_plan import plan_layout
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import format_bytes

SKIPPED = "quantization.skip_modules"
SETTING = "load.memory_budget"
# Takes the name of a layer, its input and the gradient of its output, `(..., in)` and `(..., out)`.
Measure = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """A layer's part of the divergence, in nats a token, and the bytes that it would take more unquantized."""

    name: str
    mean_kl: float
    extra_bytes: int


def check_budget(budget_bytes: int, load_plan: LoadPlan) -> None:
    """Check that a budget leaves a choice: it suffices for the quantized weights, and not for all as they were.

    Raises:
        ModelError: it does not.
    """
    name, takes = load_plan.source.base_name, load_plan.layout.inventory.total_bytes
    whole = takes + sum(extra_bytes(load_plan).values())
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


def extra_bytes(load_plan: LoadPlan) -> dict[str, int]:
    """Return what each linear layer that would be quantized takes more unquantized, by full name."""
    itemsize = load_plan.layout.dtype.itemsize
    layers = {f"{name}.weight": name for name, _ in linear_layers(load_plan.shapes)}
    return {
        layers[entry.name]: entry.num_parameters * itemsize - entry.weight_bytes - entry.constant_bytes
        for entry in load_plan.layout.inventory.entries
        if entry.is_quantized and entry.name in layers
    }


def keep_precision(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions, budget_bytes: int, reporter: Reporter
) -> tuple[LoadedModel, KeptPrecision]:
    """Return the model with layers unquantized that were quantized, as many as `budget_bytes` of weights allow.

    They are chosen by the predictions `exact` of the unquantized model. The modules of `loaded` are replaced.
    """
    reporter.report(PhaseStarted(title="Measuring what each layer costs"))
    mean_kl, parts = parts_of_divergence(loaded, load_plan, exact)
    chosen = choose(parts, budget_bytes - loaded.inventory.total_bytes)
    kept = _with_layers(loaded, load_plan, exact, [part.name for part in chosen])
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


def parts_of_divergence(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions
) -> tuple[float, list[LayerPart]]:
    """Return the mean divergence from `exact`, in nats a token, and the part of each quantized linear layer in it."""
    extra = extra_bytes(load_plan)
    layers = {name: loaded.base.get_submodule(name) for name in extra}
    parts: dict[str, float] = {}

    def measure(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        held = loaded.layout.method.held_weight(layers[name])
        assert held is not None, f"{name} is quantized"
        difference = _exact_weight(load_plan, exact, name).to(held.device, torch.float32) - held.float()
        ascent = gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()
        parts[name] = parts.get(name, 0.0) - 0.5 * float((ascent * difference).sum())

    with _watching(layers, measure), _from_embeddings(loaded.base):
        logits = exact.logits_of(loaded.base).log_softmax(1)
        reference = exact.logits.to(logits.device).log_softmax(1)
        pointwise = kl_div(logits, reference, reduction="none", log_target=True)
        # A forbidden token has an infinite logit in both.
        mean_kl = torch.where(reference.isneginf(), 0.0, pointwise).sum() / len(logits)
        mean_kl.backward()  # type: ignore[no-untyped-call]
    return float(mean_kl.detach()), [
        LayerPart(name=name, mean_kl=part, extra_bytes=extra[name]) for name, part in parts.items()
    ]


def _exact_weight(load_plan: LoadPlan, exact: UnquantizedPredictions, name: str) -> torch.Tensor:
    """Return the unquantized weight of a layer, `(out, in)`."""
    weight = exact.read(f"{name}.weight")
    return weight.T if isinstance(load_plan.shapes.get_submodule(name), Conv1D) else weight


@contextmanager
def _watching(layers: Mapping[str, nn.Module], measure: Measure) -> Iterator[None]:
    """Call `measure` with the name of each layer, its input and the gradient of its output, in the backward pass."""

    def watch(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: measure(name, inputs.detach(), gradient)
        )

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda _, given, output, name=name: watch(name, given[0], output)))
        layer.train()  # bitsandbytes repacks weights in eval mode on some CPUs, and has no gradient then
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.eval()


@contextmanager
def _from_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Have gradients flow back to the embeddings, so that each layer's output gets its own, though none is trained."""
    handle = embedding_of(model).register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def _with_layers(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions, names: list[str]
) -> LoadedModel:
    """Return the model with the layers `names` unquantized, as if it had been loaded so."""
    if not names:
        return loaded
    model, dtype = loaded.base, load_plan.layout.dtype
    for name in names:
        model.set_submodule(name, _unquantized_layer(load_plan, exact, name, model.get_submodule(name)))
    skipped = (*(loaded.settings.quantization.skip_modules or ()), *names)
    settings = with_settings(loaded.settings, {SKIPPED: skipped})
    layout = plan_layout(load_plan.shapes, settings.quantization, dtype, device=loaded.device)
    model.config.quantization_config.llm_int8_skip_modules = sorted(layout.unquantized)
    errors = loaded.errors
    if errors is not None:
        errors = {weight: error for weight, error in errors.items() if weight.removesuffix(".weight") not in names}
    inventory = take_inventory(model, layout.unquantized)
    return replace(loaded, settings=settings, layout=layout, inventory=inventory, errors=errors)


def _unquantized_layer(
    load_plan: LoadPlan, exact: UnquantizedPredictions, name: str, quantized: nn.Module
) -> nn.Module:
    layer, weight = deepcopy(load_plan.shapes.get_submodule(name)), exact.read(f"{name}.weight")
    bias = quantized.bias
    held = bias.device if isinstance(bias, torch.Tensor) else quantized.get_parameter("weight").device
    layer.weight = nn.Parameter(weight.to(held, load_plan.layout.dtype), requires_grad=False)
    layer.bias = bias
    return layer.eval()
