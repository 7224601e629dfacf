"""The modules that stay in 16 bit, with the reason: one table for all architectures.

Heads, routers and state-space modules are small or fragile: errors in them do not average out over many weights, or
a kernel reads their weight directly and would read packed codes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_cli.quantization.methods import stored_weight

HEAD = "output head"
ROUTER_NAME = re.compile(r"(^|\.)(router|gate|[a-z_]*router[a-z_]*|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class SkipRule:
    """Linear layers whose full name matches `pattern` stay unquantized, for `reason`."""

    pattern: re.Pattern[str]
    reason: str


RULES = (
    SkipRule(re.compile(r"(^|\.)(lm_head|embed_out|score|classifier)$"), HEAD),
    SkipRule(ROUTER_NAME, "router"),
    SkipRule(re.compile(r"(^|\.)mamba(\.|$)"), "state-space mixer"),
    SkipRule(re.compile(r"(^|\.)mixer\.(out_proj|x_proj|dt_proj)$"), "state-space weight that a fused kernel reads"),
    SkipRule(re.compile(r"(^|\.)(vision|visual|audio)[a-z_]*(\.|$)"), "vision or audio tower"),
    SkipRule(re.compile(r"(^|\.)([a-z_]*projector|merger|connector)(\.|$)"), "projector between towers"),
)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Yield the layers that can be quantized, with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def unquantized_layers(model: PreTrainedModel, asked: tuple[str, ...] | None) -> dict[str, str]:
    """Return the linear layers and fused experts of `model` that stay unquantized, by full name, with the reason.

    `asked` are names, or dot-separated parts of names, that the user wants unquantized, too.
    """
    asked = asked or ()
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    unquantized = {name: "as asked" for name, _ in fused_experts(model) if has_part(name, asked)}
    for name, module in linear_layers(model):
        if module is head or name in tied:
            unquantized[name] = HEAD
        elif reason := _reason(name):
            unquantized[name] = reason
        elif type(module) not in (nn.Linear, Conv1D):  # its own forward may read the weight
            unquantized[name] = f"a {type(module).__name__}, not a plain linear layer"
        elif _is_kept_in_fp32(model, name):
            unquantized[name] = "kept in fp32 by its architecture"
        elif has_part(name, asked):
            unquantized[name] = "as asked"
    return unquantized


def has_part(name: str, parts: Iterable[str]) -> bool:
    """Return whether `name` contains one of `parts` between dots."""
    return any(f".{part}." in f".{name}." for part in parts)


def _is_kept_in_fp32(model: PreTrainedModel, name: str) -> bool:
    # transformers' quantizers skip the first; the second, kept in fp32 even in bf16 runs, they would quantize.
    in_16_bit_runs = not should_convert_module(name, list(model._keep_in_fp32_modules or ()))
    return in_16_bit_runs or has_part(name, model._keep_in_fp32_modules_strict or ())


def _reason(name: str) -> str | None:
    return next((rule.reason for rule in RULES if rule.pattern.search(name)), None)


def tied_weights(model: PreTrainedModel) -> Mapping[str, str]:
    """Return the weights that share memory with another, by full name."""
    return dict(model.all_tied_weights_keys or {})


def fused_experts(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Yield the full names of the weights of fused experts, and their shapes as if nothing were packed.

    transformers 5 stacks the experts of a layer into one parameter, `(num_experts, …, …)`, which is no linear layer:
    bitsandbytes silently leaves it in 16 bit.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        shapes = {
            name: weight.shape for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        }
        for name, chain in getattr(module, "parametrizations", {}).items():
            shapes[name] = stored_weight(module, name, chain.original).shape
        for name, shape in shapes.items():
            if holds_experts(f"{path}.{name}", module, len(shape)):
                yield f"{path}.{name}", shape


def holds_experts(name: str, module: nn.Module, num_dims: int) -> bool:
    """Return whether the parameter `name` of `module` holds several experts, stacked or, in DBRX, concatenated."""
    if num_dims not in (2, 3) or name.endswith("bias") or isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return False
    return "experts." in name or "Experts" in type(module).__name__
