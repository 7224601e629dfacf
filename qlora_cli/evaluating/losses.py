"""Compute the loss of each row as in training, in batches that fit in memory.

The head and the loss are TRL's fused ones: logits exist one tile at a time, on a GPU only where a token is trained.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from qlora_cli.data.feeding.collate import make_collator
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.events import EvaluationAdvanced, Noted, Reporter
from qlora_cli.hardware.counters import is_out_of_memory
from qlora_cli.settings.choices import DEFAULT_METHOD, quant_flag


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """The results of a model for each row, in the order of the data; arrays are `(rows,)`.

    Attributes:
        nll: Sum of the negative log-likelihoods of the row's trained tokens, float64.
        correct: Number of trained tokens that are the most likely token.
        tokens: Number of trained tokens.
        seconds: The time of the computation.
        num_left_out: Trained tokens that are not counted, since the base lacks them.
        num_fed: All tokens of the rows, without padding.
        batch_size: The final batch size.
    """

    nll: NDArray[np.float64]
    correct: Numbers
    tokens: Numbers
    num_left_out: int
    seconds: float
    num_fed: int
    batch_size: int

    @property
    def loss(self) -> float:
        """The mean over all trained tokens."""
        return float(self.nll.sum() / self.tokens.sum())


@torch.no_grad()
def measure_losses(
    model: PreTrainedModel | PeftModel,
    data: PreparedData,
    *,
    pad_token_id: int | None,
    dtype: torch.dtype,
    batch_size: int,
    num_known: int | None = None,
    title: str,
    reporter: Reporter,
) -> RowLosses:
    """Return the losses of `model` on the rows of `data`, computed in `dtype`; `title` names it in progress reports.

    Tokens with ids from `num_known` on, if given, are not counted: a model that is compared lacks them.
    Rows are batched by length, the longest first. If a batch does not fit in memory, it and all later ones are
    halved.

    Raises:
        OutOfMemoryError: one row alone does not fit.
        ModelError: TRL's loss does not work for the model.
    """
    collate = make_collator(pad_token_id, packing=False)
    order = np.argsort(-data.lengths, kind="stable")
    figures_of_rows = np.zeros((len(order), 3))
    progress = _LossProgress(data.lengths, title, reporter)
    done = num_left_out = 0
    with _evaluating(model):
        while done < len(order):
            indices = order[done : done + batch_size]
            batch = collate([data.dataset[int(index)] for index in indices])
            num_new = _mask_new_tokens(batch, num_known)
            figures = _try_batch(model, batch, dtype)
            if figures is None:
                batch_size = _halved(len(indices), batch, reporter)
                continue
            figures_of_rows[indices] = figures
            done += len(indices)
            num_left_out += num_new
            progress.report(order[:done])
    return RowLosses(
        nll=figures_of_rows[:, 0],
        correct=figures_of_rows[:, 1].astype(np.int64),
        tokens=figures_of_rows[:, 2].astype(np.int64),
        num_left_out=num_left_out,
        seconds=progress.seconds,
        num_fed=int(data.lengths.sum()),
        batch_size=batch_size,
    )


class _LossProgress:
    """Reports the number of completed rows, and the remaining time by tokens."""

    def __init__(self, lengths: Numbers, title: str, reporter: Reporter) -> None:
        self._lengths = lengths
        self._title = title
        self._reporter = reporter
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def report(self, done: Numbers) -> None:
        share = int(self._lengths[done].sum()) / int(self._lengths.sum())
        self._reporter.report(
            EvaluationAdvanced(
                title=self._title,
                unit="row",
                num_done=len(done),
                num_all=len(self._lengths),
                seconds_left=self.seconds * (1 - share) / share,
            )
        )


def _mask_new_tokens(batch: dict[str, Any], num_known: int | None) -> int:
    """Mask labels from `num_known` on in a batch, and return their number."""
    labels = batch["labels"]
    is_new = labels >= (torch.iinfo(labels.dtype).max if num_known is None else num_known)
    batch["labels"] = labels.masked_fill(is_new, IGNORE_INDEX)
    return int(is_new[:, 1:].sum())  # nothing predicts the first token


def _try_batch(model: Any, batch: dict[str, Any], dtype: torch.dtype) -> NDArray[np.float64] | None:
    """Return `(rows, 3)`: negative log-likelihood, correct and trained tokens; None if memory is short."""
    lower = dtype != torch.float32
    try:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        with torch.autocast(model.device.type, dtype=dtype) if lower else nullcontext():
            output = model(**inputs, use_cache=False, fused_lm_head=True)
        figures = (-output.log_probs.double(), output.is_top1.double(), output.label_mask.double())
        summed: NDArray[np.float64] = torch.stack([figure.sum(1) for figure in figures], dim=1).cpu().numpy()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return summed


def _halved(num_rows: int, batch: dict[str, Any], reporter: Reporter) -> int:
    """Return half the size of a batch that did not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    length = batch["input_ids"].shape[1]
    if num_rows == 1:
        raise OutOfMemoryError(
            f"a row of {length:,} tokens does not fit in memory with the model",
            hint=f"Use --max-length {max(8, length // 2)}, or {quant_flag([DEFAULT_METHOD])} if the model is not "
            "quantized.",
        )
    smaller = num_rows // 2
    reporter.report(
        Noted(
            level="warning",
            message=f"{num_rows} rows of {length:,} tokens do not fit in memory at once: going on with {smaller}",
        )
    )
    return smaller


@contextmanager
def _evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Give the model TRL's fused head, without dropout, and restore it afterwards."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.base_model is base:  # TRL's head would call itself recursively
        raise ModelError(
            f"TRL's loss does not find the layers of {type(base).__name__}, and can't evaluate it",
            hint="Its class does not name them by base_model_prefix; choose another model.",
        )
    was_training, forward = model.training, base.__dict__.get("forward")
    model.eval()
    add_fused_lm_head(base, outputs=("log_probs", "is_top1"))
    try:
        yield
    finally:
        if forward is None:
            del base.forward
        else:
            base.forward = forward
        model.train(was_training)
