"""What stays in 16 bit, and why: one table, for every architecture.

Heads, routers and state-space parts are small or fragile: an error in them is not averaged out over many weights,
or a kernel reads their weight itself and would read packed codes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

HEAD = "output head"
ROUTER_NAME = re.compile(r"(^|\.)(router|gate|[a-z_]*router[a-z_]*|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class Rule:
    """Linear layers whose full name matches `pattern` are kept, because they are `reason`."""

    pattern: re.Pattern[str]
    reason: str


RULES = (
    Rule(re.compile(r"(^|\.)(lm_head|embed_out|score|classifier)$"), HEAD),
    Rule(ROUTER_NAME, "router"),
    Rule(re.compile(r"(^|\.)mamba(\.|$)"), "state-space mixer"),
    Rule(re.compile(r"(^|\.)mixer\.(out_proj|x_proj|dt_proj)$"), "state-space weight that a fused kernel reads"),
    Rule(re.compile(r"(^|\.)(vision|visual|audio)[a-z_]*(\.|$)"), "vision or audio tower"),
    Rule(re.compile(r"(^|\.)([a-z_]*projector|merger|connector)(\.|$)"), "projector between towers"),
)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Yield the layers that could be quantized, with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def kept_layers(model: PreTrainedModel, asked: tuple[str, ...] | None) -> dict[str, str]:
    """Return the linear layers of `model` that stay unquantized, by full name, with the reason.

    `asked` are names or parts of names, dot to dot, that the user wants kept too.
    """
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    kept: dict[str, str] = {}
    for name, module in linear_layers(model):
        if module is head or name in tied:
            kept[name] = HEAD
        elif reason := _reason(name):
            kept[name] = reason
        elif type(module) not in (nn.Linear, Conv1D):  # with a forward of its own, which reads the weight
            kept[name] = f"a {type(module).__name__}, no plain linear layer"
        elif asked is not None and any(f".{part}." in f".{name}." for part in asked):
            kept[name] = "as asked"
    return kept


def _reason(name: str) -> str | None:
    return next((rule.reason for rule in RULES if rule.pattern.search(name)), None)


def tied_weights(model: PreTrainedModel) -> Mapping[str, str]:
    """Return the weights that share memory with another, by full name."""
    return dict(model.all_tied_weights_keys or {})


def fused_experts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of fused experts, `(num_experts, …, …)`, with their full names; quantized ones dequantized.

    transformers 5 stacks the experts of a layer into one parameter, which is no linear layer: bitsandbytes
    leaves it in 16 bit without a word.
    """
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            continue
        for name in [*module._parameters, *getattr(module, "parametrizations", {})]:
            weight = getattr(module, name)
            if weight is not None and weight.dim() == 3 and weight.is_floating_point():
                yield f"{module_name}.{name}", weight
