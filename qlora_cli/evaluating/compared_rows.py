"""Measure answers that are compared: each is a row of its own, and for KTO so are answers to other prompts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from datasets import Dataset

from qlora_cli.data.feeding.collate import sequences_of
from qlora_cli.data.feeding.mismatched import start_of_answer, with_answer_of
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.data.feeding.token_table import Mask, Numbers
from qlora_cli.errors import DataError
from qlora_cli.evaluating.answer_losses import AnswerLosses
from qlora_cli.evaluating.losses import MeasuredRows, RowLosses
from qlora_cli.units import counted

Measure = Callable[[MeasuredRows], RowLosses]


class _ByIndex(Protocol):
    """Rows that are made when they are asked for."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class _MadeRows:
    """Rows for `measure_losses`, and their lengths, `(rows,)`."""

    dataset: _ByIndex
    lengths: Numbers


@dataclass(frozen=True)
class _Answers:
    """The sequences of rows, `per_row` of each."""

    rows: Dataset
    per_row: int

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, place = divmod(index, self.per_row)
        return sequences_of(self.rows[row])[place]


@dataclass(frozen=True)
class _Mismatched:
    """The prompt of each row with the answer of another one."""

    rows: Dataset
    others: Numbers
    longest_tokens: int

    def __getitem__(self, index: int) -> dict[str, Any]:
        return with_answer_of(self.rows[index], self.rows[int(self.others[index])], self.longest_tokens)


@dataclass(frozen=True, kw_only=True)
class MeasuredAnswers:
    """The losses of all answers by one model, and of the mismatched ones, if answers have labels."""

    answers: RowLosses
    mismatched: RowLosses | None


@dataclass(frozen=True, kw_only=True)
class ComparedRows:
    """Held-out rows whose answers are compared.

    Attributes:
        data: The rows.
        is_desirable: Whether the answer of each is wanted, `(rows,)`; None of pairs.
        rows_per_baseline: The answers whose mean gain is a baseline, in the order of the rows.
        longest_tokens: What an answer to another prompt is cut to.
    """

    data: PreparedData
    is_desirable: Mask | None
    rows_per_baseline: int
    longest_tokens: int

    @classmethod
    def of_data(cls, data: PreparedData, *, rows_per_step: int, longest_trained_tokens: int) -> "ComparedRows | None":
        """Return rows that are pairs or have labels; None of others.

        Their baselines are those of an evaluation in training: of as many rows as a step has. `longest_trained_tokens`
        are those of the longest row that was trained, 0 if none is known.

        Raises:
            DataError: no row, or every row, is wanted by its label.
        """
        table = data.table
        if not (table.has_pairs or table.has_labels):
            return None
        is_desirable = table.desirable[data.selected] == 1 if table.has_labels else None
        if is_desirable is not None and len(set(is_desirable.tolist())) == 1:
            kind = "wanted" if is_desirable[0] else "not wanted"
            raise DataError(
                f"all of {counted(len(is_desirable), 'answer')} of {data.report.name} are {kind} by their labels, so "
                "that there is nothing to compare",
                hint="Name rows of both kinds with --dataset, or hold out more of them.",
            )
        longest = max(longest_trained_tokens, data.longest_tokens)
        return cls(data=data, is_desirable=is_desirable, rows_per_baseline=rows_per_step, longest_tokens=longest)

    @property
    def has_pairs(self) -> bool:
        """Whether rows are pairs of answers, or else single ones with labels."""
        return self.is_desirable is None

    def measure(self, measure: Measure) -> MeasuredAnswers:
        """Return the losses of the answers by the model that `measure` measures."""
        return MeasuredAnswers(
            answers=measure(self._answers), mismatched=None if self.has_pairs else measure(self._mismatched)
        )

    def losses(self, own: MeasuredAnswers, base: MeasuredAnswers | None) -> AnswerLosses:
        """Return what a model makes of the answers, of its own losses and of those of its base, if it is known."""
        gain = None
        if base is not None and base.mismatched is not None and own.mismatched is not None:
            gain = base.mismatched.nll - own.mismatched.nll
        return AnswerLosses(
            nll=own.answers.nll,
            tokens=own.answers.tokens,
            reference_nll=None if base is None else base.answers.nll,
            is_desirable=self.is_desirable,
            gain=gain,
            rows_per_baseline=None if self.has_pairs else self.rows_per_baseline,
        )

    def chosen(self, losses: RowLosses) -> RowLosses:
        """Return the losses of the chosen answers of pairs, or of the wanted ones, of those of all answers."""
        mask = np.arange(len(losses.nll)) % 2 == 0 if self.is_desirable is None else self.is_desirable
        return replace(
            losses, nll=losses.nll[mask], correct=losses.correct[mask], tokens=losses.tokens[mask], states=None
        )

    @property
    def _answers(self) -> MeasuredRows:
        table, rows = self.data.table, self.data.selected
        first, fed = table.first[rows], table.fed[rows]
        lengths = np.stack([first, fed - first], 1).reshape(-1) if self.has_pairs else fed
        return _MadeRows(dataset=_Answers(self.data.dataset, 2 if self.has_pairs else 1), lengths=lengths)

    @property
    def _mismatched(self) -> MeasuredRows:
        """The prompt of each row with the answer before it, of the first of a group with that of its last."""
        fed, size = self.data.table.fed[self.data.selected], self.rows_per_baseline
        places = np.arange(len(fed))
        lasts = np.minimum(places - places % size + size, len(fed)) - 1
        others = np.where(places % size == 0, lasts, places - 1)
        starts = np.array([start_of_answer(row) for row in self.data.dataset])
        lengths = np.minimum(starts + (fed - starts)[others], self.longest_tokens)
        return _MadeRows(dataset=_Mismatched(self.data.dataset, others, self.longest_tokens), lengths=lengths)
