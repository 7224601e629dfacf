"""The loss of each row, computed as training computes it, in batches that fit in memory.

The head and the loss are TRL's fused ones: logits exist one tile at a time, on a GPU only where a token is supervised.
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
    """What a model makes of each row, in the order of the data; arrays are `(rows,)`.

    Attributes:
        nll: Negative log-likelihood of the row's supervised tokens, summed, float64.
        correct: How many of them are the most likely token.
        tokens: How many there are.
        seconds: The time that it took.
        num_left_out: Tokens that are supervised and not counted: the base has no such token.
        num_fed: All tokens of the rows, padding left out.
        batch_size: Rows that were fed at once in the end.
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
        """The mean over all supervised tokens."""
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
    """Return what `model` makes of the rows of `data`, computed in `dtype`; `title` says whose rows are counted.

    Of tokens from the id `num_known` on none is counted, if it is given: a model that they are compared on lacks them.
    Rows of one length go together, the longest first. A batch that does not fit in memory is halved, and with it all
    that follow.

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
            places = order[done : done + batch_size]
            batch = collate([data.dataset[int(place)] for place in places])
            num_new = _leave_out(batch, num_known)
            figures = _try_batch(model, batch, dtype)
            if figures is None:
                batch_size = _halved(len(places), batch, reporter)
                continue
            figures_of_rows[places] = figures
            done += len(places)
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
    """Tells how many rows are done, and how long the others will take by their tokens."""

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


def _leave_out(batch: dict[str, Any], num_known: int | None) -> int:
    """Take the labels from `num_known` on out of a batch, and return how many there were that count."""
    labels = batch["labels"]
    is_new = labels >= (torch.iinfo(labels.dtype).max if num_known is None else num_known)
    batch["labels"] = labels.masked_fill(is_new, IGNORE_INDEX)
    return int(is_new[:, 1:].sum())  # nothing predicts the first token


def _try_batch(model: Any, batch: dict[str, Any], dtype: torch.dtype) -> NDArray[np.float64] | None:
    """Return `(rows, 3)`: negative log-likelihood, correct and supervised tokens; None if memory is short."""
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
    """Return half the rows of a batch that did not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    length = batch["input_ids"].shape[1]
    if num_rows == 1:
        raise OutOfMemoryError(
            f"a row of {length:,} tokens does not fit in memory beside the model",
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
    """Give the model TRL's head, without dropout, and leave it as it was."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.base_model is base:  # where TRL's head would call itself
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
