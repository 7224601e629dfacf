"""Measure what a run forgot, at its end: general text with the adapter off, then on."""

import math

from qlora_cli.adapters.initialization import base_change
from qlora_cli.adapters.targets import ADAPTER
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.evaluating.losses import measure_losses
from qlora_cli.events import Noted, PhaseStarted, Reporter, SilentReporter
from qlora_cli.runs.forgetting import Forgetting
from qlora_cli.settings.values import OFF, WHERE_CHEAP
from qlora_cli.training.outcome.general_text import GeneralText, general_rows, text_of
from qlora_cli.training.run_plan import PreparedRun

# `auto` measures a run that trains as many times the tokens: two forward passes cost 5 % of that at most.
TIMES_THE_TEXT = 20
ROWS_AT_ONCE = 4


def measure_forgetting(prepared: PreparedRun, num_trained: int, reporter: Reporter) -> Forgetting | None:
    """Return what a run of `num_trained` tokens forgot; None if that is not to be, or can't be, measured."""
    setting = prepared.settings.training.general_text
    if setting == OFF:
        return None
    try:
        text = _rows_of(prepared, setting)
    except (OSError, ModelError) as error:  # the file is gone since the run began; or the tokenizer fails on it
        _note_unmeasured(str(error), reporter)
        return None
    num_tokens = int(text.lengths.sum())
    if setting == WHERE_CHEAP and num_trained < TIMES_THE_TEXT * num_tokens:
        return None
    if not num_tokens:
        _note_unmeasured(f"{text.name} has fewer than two tokens", reporter)
        return None
    if reason := base_change(prepared.model.peft_config[ADAPTER]):
        _note_unmeasured(reason, reporter)
        return None
    reporter.report(PhaseStarted(title=f"Measuring what was forgotten, on {num_tokens:,} tokens of general text"))
    try:
        with prepared.model.disable_adapter():
            base_loss, _ = _loss_on(text, prepared)
        loss, num_predicted = _loss_on(text, prepared)
    except OutOfMemoryError as error:
        _note_unmeasured(error.message, reporter)
        return None
    if not (math.isfinite(base_loss) and math.isfinite(loss)):
        _note_unmeasured(f"its loss is {base_loss} before and {loss} after training", reporter)
        return None
    return Forgetting(
        text=text.name, fingerprint=text.fingerprint, num_tokens=num_predicted, base_loss=base_loss, loss=loss
    )


def _rows_of(prepared: PreparedRun, setting: str) -> GeneralText:
    name, text = text_of(setting)
    return general_rows(name, text, prepared.loaded.tokenizer, max_length=prepared.settings.data.max_length)


def _loss_on(text: GeneralText, prepared: PreparedRun) -> tuple[float, int]:
    """Return the mean loss, and the number of tokens that were predicted."""
    losses = measure_losses(
        prepared.model,
        text,
        pad_token_id=prepared.loaded.tokenizer.pad_token_id,
        dtype=prepared.loaded.dtype.torch_dtype,
        batch_size=ROWS_AT_ONCE,
        title=text.name,
        reporter=SilentReporter(),  # it takes seconds, and the phase was reported
    )
    return losses.loss, int(losses.tokens.sum())


def _note_unmeasured(reason: str, reporter: Reporter) -> None:
    reporter.report(Noted(level="warning", message=f"what was forgotten is not measured: {reason}"))
