"""Find the part of each quantized weight in the divergence of predictions from those of the unquantized model.

Near the unquantized model, the divergence is a quadratic form of the errors of all weights. Half its gradient with
respect to a weight times that weight's error is the weight's part of the divergence: the parts of all weights add up
to the whole. One pass in both directions has them all, so that no layer needs to be tried.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from qlora_cli.calibrating.prediction_error import UnquantizedPredictions
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.quantization.embedding import embedding_of

TOKENS_AT_ONCE = 128  # whose probabilities are in memory, over the whole vocabulary
ROWS_AT_ONCE = 4096  # of a weight `(out, in)`, compared in fp32


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """A layer's part of the divergence, in nats a token, and the bytes that it would take more unquantized."""

    name: str
    mean_kl: float
    extra_bytes: int


def parts_of_divergence(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions
) -> tuple[float, list[LayerPart]]:
    """Return the mean divergence from `exact`, in nats a token, and the part of each quantized layer in it.

    In memory are the weights, the activations of one decoder layer, and the inputs of all.
    """
    model, extra = loaded.base, load_plan.layout.extra_bytes
    parts: dict[str, float] = {}

    def add(name: str, gradient: torch.Tensor, error: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        unquantized, held = error()
        parts[name] = parts.get(name, 0.0) - 0.5 * _product_with_difference(gradient, unquantized, held)

    with ExitStack() as stack:
        for name in extra:
            if name in loaded.layout.experts:
                stack.enter_context(_watching_experts(loaded, exact, name, add))
            else:
                stack.enter_context(_watching_layer(loaded, load_plan, exact, name, add))
        stack.enter_context(_recomputing(model))
        stack.enter_context(_from_embeddings(model))
        logits = exact.logits_of(model)
        pieces = zip(*(torch.split(one, TOKENS_AT_ONCE) for one in (logits, exact.logits)), strict=True)
        sums = [checkpoint(_sum_of_divergence, *piece, use_reentrant=False) for piece in pieces]
        mean_kl = torch.stack(sums).sum() / len(logits)
        mean_kl.backward()  # type: ignore[no-untyped-call]
    return float(mean_kl.detach()), [
        LayerPart(name=name, mean_kl=part, extra_bytes=extra[name]) for name, part in parts.items()
    ]


def _sum_of_divergence(logits: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the summed divergence of the predictions of `logits`, `(tokens, vocabulary)`, from those of `exact`."""
    predicted, reference = logits.log_softmax(1), exact.to(logits.device).log_softmax(1)
    pointwise = kl_div(predicted, reference, reduction="none", log_target=True)
    # A forbidden token has an infinite logit in both.
    return torch.where(reference.isneginf(), 0.0, pointwise).sum()


# Takes the name of a layer, the gradient of its weight, and what returns the weight unquantized and as it is held.
Add = Callable[[str, torch.Tensor, Callable[[], tuple[torch.Tensor, torch.Tensor]]], None]


def _product_with_difference(gradient: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ⟨gradient, one - other⟩ of tensors of one shape, in fp32, some rows or one expert at a time."""
    number = 1 if gradient.dim() > 2 else ROWS_AT_ONCE
    pieces = zip(*(torch.split(tensor, number) for tensor in (gradient, one, other)), strict=True)
    device = gradient.device
    return sum(
        float((slope.float() * (first.to(device).float() - second.to(device).float())).sum())
        for slope, first, second in pieces
    )


@contextmanager
def _watching_layer(
    loaded: LoadedModel, load_plan: LoadPlan, exact: UnquantizedPredictions, name: str, add: Add
) -> Iterator[None]:
    """Call `add` with the gradient of the weight of a linear layer, `(out, in)`, in the backward pass."""
    layer = loaded.base.get_submodule(name)
    is_conv1d = isinstance(load_plan.shapes.get_submodule(name), Conv1D)  # stored as (in, out)

    def error() -> tuple[torch.Tensor, torch.Tensor]:
        weight, held = exact.read(f"{name}.weight"), loaded.layout.method.held_weight(layer)
        assert held is not None, f"{name} is quantized"
        return weight.T if is_conv1d else weight, held

    def measure(inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        add(name, gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float(), error)

    def watch(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        return _Output.apply(output, given[0], measure)  # type: ignore[no-untyped-call]

    handle = layer.register_forward_hook(watch)
    layer.train()  # bitsandbytes repacks weights in eval mode on some CPUs, and has no gradient then
    try:
        yield
    finally:
        handle.remove()
        layer.eval()


@contextmanager
def _watching_experts(loaded: LoadedModel, exact: UnquantizedPredictions, name: str, add: Add) -> Iterator[None]:
    """Call `add` with the gradient of the fused weight `name` of experts in the backward pass."""
    owner, _, leaf = name.rpartition(".")
    module: Any = loaded.base.get_submodule(owner)

    def error() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return exact.read(name), getattr(module, leaf)

    # The weight is dequantized by a parametrization whenever it is read, and then passed on by this one.
    chain = module.parametrizations[leaf]
    chain.append(_WatchedWeight(lambda gradient: add(name, gradient, error), chain.original.device))
    try:
        yield
    finally:
        del chain[-1]


class _Output(torch.autograd.Function):
    """Returns the output of a layer; in the backward pass, calls `measure` with its input and its output's gradient.

    They are `(..., in)` and `(..., out)`. The input is kept as other activations are.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, inputs: torch.Tensor, measure: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.measure = measure
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.measure(*ctx.saved_tensors, gradient)
        return gradient, None, None


class _Weight(torch.autograd.Function):
    """Returns a weight, and calls `measure` with its gradient in the backward pass.

    `origin` is any tensor that requires a gradient, which it does not get.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, _origin: torch.Tensor, measure: Callable[..., None]) -> torch.Tensor:
        ctx.measure = measure
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.measure(gradient)
        return None, None, None


class _WatchedWeight(nn.Module):
    """A parametrization that leaves a weight as it is, and calls `measure` with its gradient."""

    def __init__(self, measure: Callable[[torch.Tensor], None], device: torch.device) -> None:
        super().__init__()
        self._measure = measure
        self._origin = torch.zeros((), device=device, requires_grad=True)

    def forward(self, weight: torch.Tensor) -> Any:
        return _Weight.apply(weight, self._origin, self._measure)  # type: ignore[no-untyped-call]


@contextmanager
def _from_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Have gradients flow back to the embeddings, so that each layer's output gets its own, though none is trained."""
    handle = embedding_of(model).register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Have decoder layers compute their activations again in the backward pass, so that those of one are in memory.

    So are the dequantized weights of experts, which plain products keep. transformers does so in training mode alone,
    in which layers may drop activations.
    """
    places = [
        (stack, number, layer)
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for number, layer in enumerate(stack)
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    for stack, number, layer in places:
        stack[number] = _Recomputed(layer)
    try:
        yield
    finally:
        for stack, number, layer in places:
            stack[number] = layer


class _Recomputed(nn.Module):
    """A decoder layer that keeps its inputs alone for the backward pass, and computes there again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask what kind of layer it is
            return getattr(super().__getattr__("layer"), name)
