"""Measure what quantization costs a model on rows: its loss and its predictions against those without quantization.

The two models are never in memory together. Of each, the last hidden states of the trained tokens are kept, from which
the output head, which is not quantized, makes the predictions of both again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import kl_div, log_softmax

from qlora_cli.errors import ModelError, ModelNotFoundError, OutOfMemoryError
from qlora_cli.evaluating.evaluation_result import Kind, QuantizationCost
from qlora_cli.evaluating.losses import RowLosses, autocast
from qlora_cli.evaluating.statistics import finite, ratio_stderr
from qlora_cli.events import Reporter
from qlora_cli.files import existing_path
from qlora_cli.loading.load_plan import LoadPlan, plan_outlined, with_storage
from qlora_cli.loading.loader import LoadedModel, check_weights
from qlora_cli.loading.model_outline import ModelOutline, find, read_model_outline
from qlora_cli.loading.save import NOTE
from qlora_cli.loss.chunked_loss import block_tokens, slices
from qlora_cli.loss.output_head import logits_of, output_head
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.digest import base_digest
from qlora_cli.settings.choices import LoraInit, Quantization
from qlora_cli.settings.open_method import METHOD
from qlora_cli.settings.settle import with_settings

SETTING = "evaluate.with_unquantized"
UNQUANTIZED = {METHOD: Quantization.NONE, "quantization.skip_modules": None}


def plan_unquantized(load_plan: LoadPlan, model: ModelOutline, reporter: Reporter) -> LoadPlan:
    """Return the plan to load the same model unquantized; `model` are its small files.

    Of a base that was stored quantized, it is the model that this was made from.

    Raises:
        ModelError: it is not quantized, or there are no unquantized weights of it.
        OutOfMemoryError: it does not fit in memory unquantized.
    """
    source = load_plan.source
    if load_plan.layout.prequantized is not None:
        return _plan_original(load_plan, reporter)
    if not load_plan.layout.is_quantized:
        raise ModelError(
            f"{source.name} is evaluated unquantized already, so nothing is lost",
            hint="Leave it out, or quantize the model with --quant.",
            setting=SETTING,
        )
    with _explained_memory(source.base_name):
        return with_storage(load_plan, model, with_settings(load_plan.settings, UNQUANTIZED))


@contextmanager
def _explained_memory(base: str) -> Iterator[None]:
    try:
        yield
    except OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"unquantized, {error.message}",
            hint=f"Leave it out; qlora load {base} --error-on DATA compares a layer at a time.",
            setting=SETTING,
        ) from error


def _plan_original(load_plan: LoadPlan, reporter: Reporter) -> LoadPlan:
    """Return the plan to load the model that a stored quantized base was made from, with the same adapter.

    Raises:
        ModelError: the base does not say which one that is, or it is not here, or another one is.
        OutOfMemoryError: it does not fit in memory.
    """
    stored = load_plan.source
    note = read_json(stored.path / NOTE) if (stored.path / NOTE).is_file() else {}
    name, commit, digest = (note.get(key) for key in ("source", "commit", "source_digest"))
    if not isinstance(name, str):
        raise _no_original(f"{stored.base_name} is quantized already, without the weights that it was made from")
    # A file of somebody else's names it: no code of that model is run, whatever is allowed of this one.
    values = {"model.name": name, "model.revision": commit, "model.base_model": None, "model.trust_remote_code": False}
    settings = with_settings(load_plan.settings, {**values, **UNQUANTIZED})
    made_from = f"{stored.base_name} is quantized already, and {name}, which it was made from,"
    if commit is None and existing_path(name) is None:  # no repository may stand in for a directory
        raise _no_original(f"{made_from} is not here")
    try:
        found = find(settings.model, reporter)
    except ModelNotFoundError as error:
        raise _no_original(f"{made_from} is not here: {error.message}") from error
    if found.source.adapter is not None or (commit is None and base_digest(found.source.path) != digest):
        raise _no_original(f"{made_from} has other weights now")
    keys = ("path", "base_name", "revision", "commit", "pending")
    source = replace(stored, **{key: getattr(found.source, key) for key in keys})
    with _explained_memory(name):
        outline = read_model_outline(source, trust_remote_code=False)
        original = plan_outlined(outline, settings, reporter)
    check_weights(original, reporter)
    return original


def _no_original(message: str) -> ModelError:
    return ModelError(message, hint="Leave it out, or evaluate the 16-bit model with --quant.", setting=SETTING)


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
