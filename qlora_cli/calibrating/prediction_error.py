"""Measure what quantization costs on text: the error of predictions, and that of the outputs of layers.

The loaded model runs as it is; the unquantized one runs next to it with the weights of one layer at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.calibrating.calibration import base_model
from qlora_cli.calibrating.calibration_rows import CalibrationRows, read_rows
from qlora_cli.errors import DataError, ModelError
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


def check_comparable(load_plan: LoadPlan, setting: str) -> None:
    """Check that there is a quantized base, and that its unquantized weights are at hand, as `setting` needs.

    Raises:
        ModelError: there is none, or they are not.
    """
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


@dataclass(frozen=True, kw_only=True)
class UnquantizedPredictions:
    """What the unquantized model predicts on rows of the data sets `data`, with the outputs of its layers.

    `ids` and `mask` are `(rows, seq)`, padded on the right; `logits`, `(tokens, vocabulary)`, and the `layers`,
    `(tokens, width)` each, are on the CPU, for the tokens that the mask leaves. `read` returns the model's weights.
    """

    data: tuple[str, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor
    layers: tuple[torch.Tensor, ...]
    read: Callable[[str], torch.Tensor]

    @property
    def targets(self) -> torch.Tensor:
        """The next token after each, `(tokens,)`; -100 after the last of a row."""
        known = torch.where(self.mask, self.ids, NO_TARGET)
        return nn.functional.pad(known[:, 1:], (0, 1), value=NO_TARGET)[self.mask]

    def logits_of(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the logits of another model for the same tokens, `(tokens, vocabulary)` in fp32 on its device."""
        ids, mask = self.ids.to(model.device), self.mask.to(model.device)
        logits: torch.Tensor = model(ids, attention_mask=mask.long(), use_cache=False).logits
        return logits[mask].float()

    def halves(self) -> tuple["UnquantizedPredictions", "UnquantizedPredictions"]:
        """Return the predictions on the first half of the rows, and on the others."""
        middle = len(self.ids) // 2
        return self._of_rows(0, middle), self._of_rows(middle, len(self.ids))

    def _of_rows(self, begin: int, end: int) -> "UnquantizedPredictions":
        first, last = int(self.mask[:begin].sum()), int(self.mask[:end].sum())
        return replace(
            self,
            ids=self.ids[begin:end],
            mask=self.mask[begin:end],
            logits=self.logits[first:last],
            layers=tuple(layer[first:last] for layer in self.layers),
        )


def predict_unquantized(
    load_plan: LoadPlan,
    names: Datasets,
    reporter: Reporter,
    *,
    num_tokens: int = NUM_TOKENS,
    num_halves: Literal[1, 2] = 1,
) -> UnquantizedPredictions:
    """Return what the unquantized model of `load_plan` predicts on the data sets `names`.

    It is run on about `num_tokens` of them, or twice as many if these are to be halved.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read, or has too few rows.
    """
    rows = read_rows(names, load_plan, num_halves * num_tokens, reporter)
    if num_halves == 2:
        check_halves(rows, "load.error_on")
    return predict_on_rows(load_plan, rows, reporter)


def check_halves(rows: CalibrationRows, setting: str) -> None:
    """Check that layers that are chosen by some rows can be judged by others.

    Raises:
        DataError: there is one row.
    """
    if len(rows.rows) < 2:
        raise DataError(
            f"{', '.join(rows.names)}: has one row, and layers that are chosen by one are to be judged by another",
            hint="Name more data.",
            setting=setting,
        )


def predict_on_rows(load_plan: LoadPlan, chosen: CalibrationRows, reporter: Reporter) -> UnquantizedPredictions:
    """Return what the unquantized model of `load_plan` predicts on the beginnings of rows."""
    rows = [row[:MOST_TOKENS] for row in chosen.rows]
    reporter.report(PhaseStarted(title=f"Comparing {load_plan.source.base_name} with itself unquantized"))
    base = base_model(load_plan, reporter)
    read = base_reader(base, Base(base, BaseWeights.ORIGINAL))
    exact = StreamedModel(
        base.model.config,
        read,
        device=load_plan.device,
        dtype=load_plan.layout.dtype,
        trust_remote_code=load_plan.settings.model.trust_remote_code,
    )
    exact.model.set_attn_implementation(load_plan.attention.implementation)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with _outputs(exact.model, mask) as layers:
        logits = exact.logits(ids, mask.long())
    return UnquantizedPredictions(
        data=chosen.names, ids=ids, mask=mask, logits=logits, layers=tuple(layers), read=read
    )


def measure_prediction_error(loaded: LoadedModel, exact: UnquantizedPredictions) -> PredictionError:
    """Return the error of the predictions of `loaded`, which is quantized, against those of the model as it was."""
    with _outputs(loaded.base, exact.mask) as layers, torch.no_grad():
        logits = exact.logits_of(loaded.base).cpu()
    figures = divergence(exact.logits, logits, exact.targets)
    return PredictionError(
        data=exact.data,
        num_rows=len(exact.ids),
        num_tokens=figures.num_tokens,
        mean_kl=figures.mean_kl,
        top_token_agreement=figures.top_token_agreement,
        unquantized_perplexity=figures.reference_perplexity,
        perplexity=figures.perplexity,
        layers=tuple(_relative(one, two) for one, two in zip(exact.layers, layers, strict=True)),
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
