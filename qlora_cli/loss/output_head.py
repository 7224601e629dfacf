"""The output head of a model: how its logits follow from its last hidden states, and a check that they do.

Models scale and cap their logits by numbers in their configs, under several names. `check_head` compares the result
with the model's own logits, so that a name that is not known here is a refusal and not a wrong loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.hardware.device import device_of

# Attributes of configs: what logits are multiplied with, divided by, and capped at.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIED_BY_LOGITS_SCALING = "hyperclovax"  # where all others divide by it
CHECKED_TOKENS = 8
# Of the largest logit: models cap and scale their logits in 16 bit, and we in fp32.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadRows:
    """Rows of a head that are trained while the others are frozen: their token ids, and `(rows, hidden)` values."""

    ids: list[int]
    values: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputHead:
    """A head whose logits are `soft_cap * tanh((hidden @ weight.T + bias) * scale / soft_cap)`.

    Attributes:
        weight: `(vocabulary, hidden)`; of trained rows, the values before training.
        bias: `(vocabulary,)`.
        rows: Rows that replace those of `weight`.
        soft_cap: The largest absolute logit; None for no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rows: HeadRows | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def merged_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in `dtype` with the trained rows in it; a copy only if it differs from `weight`."""
        weight = self.weight.detach().to(dtype)
        if self.rows is None:
            return weight
        ids = torch.tensor(self.rows.ids, device=weight.device)
        return weight.index_copy(0, ids, self.rows.values.detach().to(dtype))


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the layers of a model without its head.

    Raises:
        ModelError: the class of the model does not name them.
    """
    backbone: nn.Module = model.base_model
    if backbone is model:
        raise ModelError(
            f"the layers of {type(model).__name__} can't be told from its output head, so its loss can't be computed",
            hint="Its class does not name them by base_model_prefix; choose another model.",
        )
    return backbone


def output_head(model: PreTrainedModel) -> OutputHead:
    """Return the head of `model` as it is now: with its adapter, if that is enabled.

    Raises:
        ModelError: it has none, or one whose weight is not a matrix of numbers.
    """
    head: Any = model.get_output_embeddings()
    rows = None
    if isinstance(head, TrainableTokensWrapper):
        rows, head = _trained_rows(head), head.original_module
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        raise ModelError(
            f"{type(model).__name__} has no output head with a weight in 16 bit or fp32, which the loss needs",
            hint="Choose another model, or a checkpoint whose output head is not quantized.",
        )
    config = model.config.get_text_config()
    return OutputHead(
        weight=weight,
        bias=None if rows is not None else getattr(head, "bias", None),  # PEFT leaves it out of a head with such rows
        rows=rows,
        scale=_scale(config),
        soft_cap=next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None))), None),
    )


@contextmanager
def gathered_head(model: PreTrainedModel) -> Iterator[OutputHead]:
    """Yield the head of `model` as `output_head` returns it, whole also if processes hold a part of it each."""
    module = model.get_output_embeddings()
    if not isinstance(module, FSDPModule):
        yield output_head(model)
        return
    module.unshard()
    try:
        yield output_head(model)
    finally:
        module.reshard()


def _trained_rows(head: Any) -> HeadRows | None:
    active = head.active_adapters
    if head.disable_adapters or not active:
        return None
    (name,) = active  # this project attaches one adapter
    layer = head.token_adapter
    return HeadRows(ids=list(layer.token_indices[name]), values=layer.trainable_tokens_delta[name])


def _scale(config: Any) -> float:
    for name in (*MULTIPLIERS, *DIVISORS):
        value = getattr(config, name, None)
        if value is not None:
            divides = name in DIVISORS and config.model_type != MULTIPLIED_BY_LOGITS_SCALING
            return float(1 / value if divides else value)
    return 1.0


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a head multiplies `hidden`: that of autocast where it is enabled."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check that logits by `output_head` are those of `model`, for a few tokens; under autocast, if it is enabled.

    Logits that are not finite say nothing about it.

    Raises:
        ModelError: they differ, so that the loss would be wrong.
    """
    backbone, hidden = backbone_of(model), list[torch.Tensor]()
    was_training = model.training
    ids = torch.arange(CHECKED_TOKENS, device=device_of(output_head(model).weight))[None]
    handle = backbone.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
    model.eval()
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
        if not hidden:  # the model calls a part of its layers alone
            backbone(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    with gathered_head(model) as head:
        logits = logits_of(hidden[0], head)
    num_rows = logits.shape[-1]
    own, others = own[..., :num_rows], own[..., num_rows:]
    if not bool(own.isfinite().all()):
        return  # damaged weights, which training reports by the first loss; nothing can be compared
    # A model may have more ids than its head has rows: no token is predicted as one of those.
    is_known = own.shape == logits.shape and bool(others.isneginf().all())
    if is_known:
        largest = LARGEST_DIFFERENCE[compute_dtype(hidden[0])] * own.abs().max()
        is_known = bool((logits - own).abs().max() <= largest)
    if not is_known:
        raise ModelError(
            f"the logits of {type(model).__name__} are not those of its output head, so its loss would be wrong",
            hint="It computes them in a way that is not known here; choose another model.",
        )


def logits_of(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Return the logits of hidden states, `(..., vocabulary)`, in fp32; under autocast, if it is enabled."""
    dtype = compute_dtype(hidden)
    logits = hidden.to(dtype) @ head.merged_weight(dtype).t()
    logits = (logits if head.bias is None else logits + head.bias.to(dtype)).float() * head.scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)
