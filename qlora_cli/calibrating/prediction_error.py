"""Measure what quantization costs on text: the error of predictions, and that of the outputs of layers.

The loaded model runs as it is; the unquantized one runs next to it with the weights of one layer at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.calibrating.calibration import base_model
from qlora_cli.calibrating.calibration_rows import read_rows
from qlora_cli.errors import ModelError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.merging.planning.base_weights import Base, base_reader
from qlora_cli.merging.verifying.divergence import divergence
from qlora_cli.merging.verifying.streamed import StreamedModel
from qlora_cli.quantization.load_report import PredictionError
from qlora_cli.settings.choices import BaseWeights
from qlora_cli.settings.values import Datasets

NUM_TOKENS = 1024  # whose logits are held for both models
MOST_TOKENS = 512  # of a row
NO_TARGET = -100


def check_comparable(load_plan: LoadPlan) -> None:
    """Check that there is a quantized base, and that its unquantized weights are at hand.

    Raises:
        ModelError: there is none, or they are not.
    """
    setting = "load.error_on"
    if load_plan.source.adapter is not None:
        raise ModelError(
            f"the error of a base is measured, and {load_plan.source.name} is an adapter of one",
            hint="Name the base.",
            setting=setting,
        )
    if load_plan.layout.prequantized is not None:
        raise ModelError(
            f"{load_plan.source.base_name} is quantized already, without the weights that it was made from",
            hint="Give the 16-bit model, and with --calibrate the data, to measure both in one run.",
            setting=setting,
        )
    if not load_plan.layout.is_quantized:
        raise ModelError("nothing is quantized, so nothing is lost", hint="Leave it out.", setting=setting)


def measure_prediction_error(
    loaded: LoadedModel, load_plan: LoadPlan, names: Datasets, reporter: Reporter
) -> PredictionError:
    """Return the error of the predictions of `loaded` on rows of the data sets `names`.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read.
    """
    rows = [row[:MOST_TOKENS] for row in read_rows(names, load_plan, NUM_TOKENS, reporter).rows]
    reporter.report(PhaseStarted(title=f"Comparing {load_plan.source.base_name} with itself unquantized"))
    base, device = base_model(load_plan, reporter), load_plan.device
    exact = StreamedModel(
        base.model.config,
        base_reader(base, Base(base, BaseWeights.ORIGINAL)),
        device=device,
        dtype=load_plan.layout.dtype,
        trust_remote_code=load_plan.settings.model.trust_remote_code,
    )
    exact.model.set_attn_implementation(load_plan.attention.implementation)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with _outputs(exact.model, mask) as unquantized:
        reference = exact.logits(ids, mask.long())
    with _outputs(loaded.base, mask) as quantized, torch.no_grad():
        output = loaded.base(ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    logits = output.logits[mask.to(device)].float().cpu()
    targets = nn.functional.pad(torch.where(mask, ids, NO_TARGET)[:, 1:], (0, 1), value=NO_TARGET)[mask]
    figures = divergence(reference, logits, targets)
    return PredictionError(
        data=tuple(names),
        num_rows=len(rows),
        num_tokens=figures.num_tokens,
        mean_kl=figures.mean_kl,
        top_token_agreement=figures.top_token_agreement,
        unquantized_perplexity=figures.reference_perplexity,
        perplexity=figures.perplexity,
        layers=tuple(_relative(one, two) for one, two in zip(unquantized, quantized, strict=True)),
    )


@contextmanager
def _outputs(model: nn.Module, mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield a list that gets the output of each decoder layer at the unmasked tokens, `(tokens, width)` on the CPU."""
    outputs: list[torch.Tensor] = []

    def add(_: nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden[mask.to(hidden.device)].cpu())

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _relative(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square of the difference over that of `exact`."""
    norm = exact.float().norm()
    return float((other.float() - exact.float()).norm() / norm) if norm else 0.0
