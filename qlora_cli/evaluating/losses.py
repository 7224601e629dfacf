"""Compute the loss of each row as in training, in batches that fit in memory.

The head and the loss are those of training: logits exist one chunk at a time, and only where a token is trained.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_cli.data.feeding.collate import make_collator
from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted, Reporter, WorkAdvanced
from qlora_cli.hardware.counters import is_out_of_memory
from qlora_cli.loss.chunked_loss import token_losses, trained_tokens
from qlora_cli.loss.output_head import backbone_of, check_head, compute_dtype, output_head
from qlora_cli.settings.choices import DEFAULT_METHOD, quant_flag


class MeasuredRows(Protocol):
    """Rows of `input_ids` and `labels`, and their lengths in tokens, `(rows,)`."""

    @property
    def dataset(self) -> Any:
        """The rows by index."""

    @property
    def lengths(self) -> Numbers:
        """The length of each row."""


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
        states: For each row the hidden states that its trained tokens were predicted from, `(tokens, hidden)` on the
            CPU, if they were to be kept.
    """

    nll: NDArray[np.float64]
    correct: Numbers
    tokens: Numbers
    num_left_out: int
    seconds: float
    num_fed: int
    batch_size: int
    states: tuple[torch.Tensor, ...] | None = None

    @property
    def loss(self) -> float:
        """The mean over all trained tokens."""
        return float(self.nll.sum() / self.tokens.sum())


@torch.no_grad()
def measure_losses(
    model: PreTrainedModel | PeftModel,
    data: MeasuredRows,
    *,
    pad_token_id: int | None,
    dtype: torch.dtype,
    batch_size: int,
    num_known: int | None = None,
    keeps_states: bool = False,
    title: str,
    reporter: Reporter,
) -> RowLosses:
    """Return the losses of `model` on the rows of `data`, computed in `dtype`; `title` names it in progress reports.

    Tokens with ids from `num_known` on, if given, are not counted: a model that is compared lacks them.
    With `keeps_states`, the result has the hidden states of all rows, too.
    Rows are batched by length, the longest first. If a batch does not fit in memory, it and all later ones are
    halved.

    Raises:
        OutOfMemoryError: one row alone does not fit.
        ModelError: the loss of this model can't be computed.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    collate = make_collator(pad_token_id, packing=False)
    order = np.argsort(-data.lengths, kind="stable")
    figures_of_rows = np.zeros((len(order), 3))
    states_of_rows: dict[int, torch.Tensor] = {}
    progress = _LossProgress(data.lengths, title, reporter)
    done = num_left_out = 0
    with _evaluating(model):
        while done < len(order):
            indices = order[done : done + batch_size]
            batch = collate([data.dataset[int(index)] for index in indices])
            num_new = _mask_new_tokens(batch, num_known)
            measured = _try_batch(base, batch, dtype, keeps_states=keeps_states)
            if measured is None:
                batch_size = _halved(len(indices), batch, reporter)
                continue
            if not done:
                with autocast(base, dtype):
                    check_head(base)
            figures_of_rows[indices], states = measured
            states_of_rows |= zip(map(int, indices), states, strict=True) if keeps_states else ()
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
        states=tuple(states_of_rows[row] for row in range(len(order))) if keeps_states else None,
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
            WorkAdvanced(
                title=f"Evaluating {self._title}",
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


def autocast(model: PreTrainedModel, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which a model computes in `dtype` as in training."""
    return torch.autocast(model.device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()


def _try_batch(
    model: PreTrainedModel, batch: dict[str, Any], dtype: torch.dtype, *, keeps_states: bool
) -> tuple[NDArray[np.float64], Sequence[torch.Tensor]] | None:
    """Return `(rows, 3)`, negative log-likelihood, correct and trained tokens, and the states of each row, if kept.

    Return None if memory is short.
    """
    try:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        labels, head = inputs.pop("labels"), output_head(model)
        with autocast(model, dtype):
            hidden = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
            positions, targets = trained_tokens(labels, IGNORE_INDEX)
            losses = token_losses(hidden, head, positions, targets, compute_dtype(hidden))
        figures = torch.stack([losses.nll.double(), losses.is_top1.double(), torch.ones_like(losses.nll).double()])
        by_position = figures.new_zeros((3, labels.numel())).index_copy_(1, positions, figures)
        summed: NDArray[np.float64] = by_position.view(3, *labels.shape).sum(2).t().cpu().numpy()
        states: Sequence[torch.Tensor] = ()
        if keeps_states:
            states = hidden.flatten(0, 1)[positions].cpu().split(summed[:, 2].astype(int).tolist())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return summed, states


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
    """Switch dropout off, and restore it afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
