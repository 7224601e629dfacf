"""Choose what runs are compared by: losses of tokens, of the objective that all have, or of chosen answers.

Losses of different objectives are different quantities. What their runs share is defined for any run on the same rows:
the loss of the chosen answers, and how often an answer is preferred as the data does, by how much more likely it is
than by the base of the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_cli.evaluating.answer_losses import AnswerFigures, ComparedBy, figures_of
from qlora_cli.evaluating.comparison_result import LossOf
from qlora_cli.evaluating.evaluation_checks import names_rows
from qlora_cli.evaluating.paired_losses import LossesOfRows
from qlora_cli.evaluating.run_losses import RunLosses
from qlora_cli.runs.record import RunRecord
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.objectives import DataFormat, Objective
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings, inferred_origin

FORMAT = "data.format"
OF_COMPARED_ROWS = (FORMAT, "data.columns", "data.loss_on")  # how they are read
LOSSES_OF: dict[Objective, LossOf] = {Objective.DPO: "dpo", Objective.ORPO: "orpo", Objective.KTO: "kto"}


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What a run is judged by: its losses, and whether each row is judged as the data does, 1 or 0, if it is known."""

    losses: LossesOfRows
    accuracy: LossesOfRows | None


@dataclass(frozen=True, kw_only=True)
class JudgedRuns:
    """What runs are judged by, in their order, what the losses are of, and what readers should know of both."""

    loss_of: LossOf
    measured: tuple[MeasuredRun, ...]
    notes: tuple[str, ...]


def judge_answers(losses: Sequence[RunLosses], by: Sequence[ComparedBy]) -> JudgedRuns:
    """Return what runs are judged by, of their losses on the same rows, and of what each compares answers by."""
    if any(one.answers is None for one in losses):
        measured = tuple(MeasuredRun(losses=one.rows, accuracy=None) for one in losses)
        return JudgedRuns(loss_of="tokens", measured=measured, notes=())
    objectives = sorted({one.objective.value for one in by})
    first = by[0] if len(objectives) == 1 else by[0].without_objective
    figures = [None if one.answers is None else figures_of(one.answers, first) for one in losses]
    has_losses = all(one is not None and one.losses is not None for one in figures)
    return JudgedRuns(
        loss_of=LOSSES_OF[first.objective] if has_losses else "chosen",
        measured=tuple(
            _measured(one, of_run, has_losses=has_losses) for one, of_run in zip(losses, figures, strict=True)
        ),
        notes=tuple(_notes(objectives, by, has_losses=has_losses)),
    )


def _measured(losses: RunLosses, figures: AnswerFigures | None, *, has_losses: bool) -> MeasuredRun:
    of_objective = figures.losses if figures is not None and has_losses else None
    return MeasuredRun(
        losses=losses.rows if of_objective is None else losses.by_row(of_objective),
        accuracy=None if figures is None else losses.by_row(figures.is_right.astype(np.float64)),
    )


def _notes(objectives: Sequence[str], by: Sequence[ComparedBy], *, has_losses: bool) -> Iterator[str]:
    if len(objectives) > 1:
        yield (
            f"the runs have different objectives ({', '.join(objectives)}): losses are those of the chosen answers, "
            "in nats a token, and accuracies are by what each run gained over its base"
        )
    elif has_losses and any(replace(one, rows_per_step=by[0].rows_per_step) != by[0] for one in by):
        yield f"the runs compare by different settings: all losses are by those of the first, beta {by[0].beta:g}"


def how_rows_are_read(asked: Resolved[EvaluateSettings], records: Sequence[RunRecord]) -> list[InferredSettings]:
    """Return how all runs read rows that are named: as the first one that compares answers, if there is one."""
    for record in records if names_rows(asked) and not asked.is_given(FORMAT) else ():
        if record.setting(FORMAT) in (DataFormat.PREFERENCE, DataFormat.UNPAIRED_PREFERENCE):
            values = {path: record.setting(path) for path in OF_COMPARED_ROWS if not asked.is_given(path)}
            where = inferred_origin("a run that compares answers")
            return [InferredSettings(values=values, origin=where, is_fixed=True)]
    return []
