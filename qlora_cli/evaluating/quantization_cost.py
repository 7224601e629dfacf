"""Measure what quantization costs a model on rows: its loss and its predictions against those without quantization.

The two models are never in memory together. Of each, the last hidden states of the trained tokens are kept, from which
the output head, which is not quantized, makes the predictions of both again.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import kl_div, log_softmax

from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.evaluating.evaluation_result import Kind, QuantizationCost
from qlora_cli.evaluating.losses import RowLosses, autocast
from qlora_cli.evaluating.statistics import finite, ratio_stderr
from qlora_cli.loading.load_plan import LoadPlan, with_storage
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.loading.model_outline import ModelOutline
from qlora_cli.loss.chunked_loss import block_tokens, slices
from qlora_cli.loss.output_head import logits_of, output_head
from qlora_cli.settings.choices import LoraInit, Quantization
from qlora_cli.settings.open_method import METHOD
from qlora_cli.settings.settle import with_settings

SETTING = "evaluate.with_unquantized"


def plan_unquantized(load_plan: LoadPlan, model: ModelOutline) -> LoadPlan:
    """Return the plan to load the same model unquantized; `model` are its small files.

    Raises:
        ModelError: it is not quantized, or there are no unquantized weights of it.
        OutOfMemoryError: it does not fit in memory unquantized.
    """
    source = load_plan.source
    if load_plan.layout.prequantized is not None:
        raise ModelError(
            f"{source.base_name} is quantized already, without the weights that it was made from",
            hint="Leave it out, or evaluate the 16-bit model with --quant.",
            setting=SETTING,
        )
    if not load_plan.layout.is_quantized:
        raise ModelError(
            f"{source.name} is evaluated unquantized already, so nothing is lost",
            hint="Leave it out, or quantize the model with --quant.",
            setting=SETTING,
        )
    settings = with_settings(load_plan.settings, {METHOD: Quantization.NONE})
    try:
        return with_storage(load_plan, model, settings)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"unquantized, {error.message}",
            hint=f"Leave it out; qlora load {source.base_name} --error-on DATA compares a layer at a time.",
            setting=SETTING,
        ) from error


def note_on_initialization(load_plan: LoadPlan) -> str | None:
    """Return why the unquantized model is no reference for an adapter initialized with quantization errors."""
    record = load_plan.source.record
    init = None if record is None else record.settings.get("lora", {}).get("init_lora_weights")
    if init not in {one.value for one in LoraInit if one.fits_quantization_error}:
        return None
    return (
        f"the adapter was initialized with the quantization errors of its base ({init}), which it adds to the "
        "unquantized one, too: their divergence is not what quantization costs"
    )


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """What was measured of the quantized model, with the hidden states of its rows."""

    source: Kind
    quantization: str
    losses: RowLosses


def quantization_cost(quantized: QuantizedModel, unquantized: RowLosses, loaded: LoadedModel) -> QuantizationCost:
    """Return what quantization costs; `unquantized` was measured of `loaded` on the same rows, with its states."""
    losses = quantized.losses
    assert (losses.tokens == unquantized.tokens).all(), "the same rows"
    kl, agreements = _divergence_of_rows(losses, unquantized, loaded)
    num_tokens = int(losses.tokens.sum())
    return QuantizationCost(
        source=quantized.source,
        quantization=quantized.quantization,
        num_tokens=num_tokens,
        loss_difference=finite(losses.loss - unquantized.loss),
        loss_difference_stderr=finite(ratio_stderr(losses.nll - unquantized.nll, losses.tokens)),
        mean_kl=finite(float(kl.sum() / num_tokens)),
        mean_kl_stderr=finite(ratio_stderr(kl, losses.tokens)),
        top_token_agreement=float(agreements.sum() / num_tokens),
    )


@torch.no_grad()
def _divergence_of_rows(
    quantized: RowLosses, unquantized: RowLosses, loaded: LoadedModel
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the summed divergence of each row, and the number of equal most likely tokens, `(rows,)` each."""
    assert quantized.states is not None, "kept for this"
    assert unquantized.states is not None, "kept for this"
    model = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    head = output_head(model)
    size, device = block_tokens(head.weight.shape[0], head.weight.device), head.weight.device
    figures = np.zeros((2, len(quantized.states)))
    for row, (states, exact_states) in enumerate(zip(quantized.states, unquantized.states, strict=True)):
        for block in slices(len(states), size):
            with autocast(model, loaded.dtype.torch_dtype):
                logits, exact = (logits_of(one[block].to(device), head) for one in (states, exact_states))
            log_probs, exact_log_probs = (log_softmax(one.double(), -1) for one in (logits, exact))
            # Rounding may make a divergence negative.
            kl = kl_div(log_probs, exact_log_probs, reduction="none", log_target=True).sum(-1).clamp_min(0)
            figures[:, row] += float(kl.sum()), float((logits.argmax(-1) == exact.argmax(-1)).sum())
    return figures[0], figures[1]
