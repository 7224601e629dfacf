"""The log-probabilities of answers that are compared, by a model and by its base, and the figures that follow.

Only the figures need torch: their formulas are those of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.settings.models import TrainingSettings
from qlora_cli.settings.objectives import Objective

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]
# The settings of a run that decide what the answers of a row are compared by.
OF_COMPARISON = (
    "objective",
    "beta",
    "desirable_weight",
    "undesirable_weight",
    "micro_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True, kw_only=True)
class ComparedBy:
    """What answers are compared by; of `sft`, which has no loss for that, only rewards are known, as those of DPO.

    `rows_per_step` is the number of rows whose mean is a baseline of KTO.
    """

    objective: Objective
    beta: float
    desirable_weight: float
    undesirable_weight: float
    rows_per_step: int

    @classmethod
    def of_settings(cls, training: TrainingSettings) -> "ComparedBy":
        """Return what a run with these settings compares answers by."""
        return cls(
            objective=training.objective,
            beta=training.beta,
            desirable_weight=training.desirable_weight,
            undesirable_weight=training.undesirable_weight,
            rows_per_step=training.rows_per_step,
        )

    @classmethod
    def of_record(cls, settings: Mapping[str, Any]) -> "ComparedBy":
        """Return what a run compares answers by, of its recorded `training` settings."""
        known = {key: settings[key] for key in OF_COMPARISON if key in settings}
        return cls.of_settings(TrainingSettings.model_validate(known))

    @property
    def without_objective(self) -> "ComparedBy":
        """The same rewards, without a loss."""
        return replace(self, objective=Objective.SFT)


@dataclass(frozen=True, kw_only=True)
class AnswerLosses:
    """Answers by a model, those of a pair in turn, chosen and rejected, or single ones with labels.

    Attributes:
        nll: The negative log-likelihood of each, in nats, `(answers,)`.
        tokens: The trained tokens of each, `(answers,)`.
        reference_nll: That by the base, without an adapter; None if it is not known.
        is_desirable: Whether each is wanted, by its label; None of pairs.
        gain: For each answer with a label, by how much, in nats, the answer before it is more likely after its prompt
            than by the base; None of pairs, and without a base.
        rows_per_baseline: The answers in each of the groups, in order, in which `gain` was measured, and of which the
            mean gain is the baseline; None of pairs.
    """

    nll: Values
    tokens: NDArray[np.int64]
    reference_nll: Values | None
    is_desirable: Mask | None = None
    gain: Values | None = None
    rows_per_baseline: int | None = None

    @property
    def is_chosen(self) -> Mask:
        """Whether each answer is the chosen one of its pair, or wanted, `(answers,)`."""
        return np.arange(len(self.nll)) % 2 == 0 if self.is_desirable is None else self.is_desirable

    @property
    def rows_of_chosen(self) -> tuple[Values, NDArray[np.int64]]:
        """The negative log-likelihood and the tokens of what each row has as a chosen answer, `(rows,)` each.

        Both are 0 of a row whose answer is not wanted.
        """
        if self.is_desirable is None:
            return self.nll[::2], self.tokens[::2]
        return np.where(self.is_desirable, self.nll, 0.0), np.where(self.is_desirable, self.tokens, 0)


@dataclass(frozen=True, kw_only=True)
class AnswerFigures:
    """What answers are compared by.

    Attributes:
        losses: The loss of each row, `(rows,)`; None if the objective compares no such rows.
        rewards: The reward of each answer, `(answers,)`.
        is_chosen: Whether it is the chosen one of its pair, or wanted, `(answers,)`.
        is_right: Whether each row is judged as its data does: a pair whose chosen answer has the higher reward, or an
            answer whose reward is on the side of the baseline that its label asks for, `(rows,)`.
        baseline: That of each answer with a label, in nats, `(rows,)`; None of pairs.
    """

    losses: Values | None
    rewards: Values
    is_chosen: Mask
    is_right: Mask
    baseline: Values | None


def figures_of(answers: AnswerLosses, by: ComparedBy) -> AnswerFigures | None:
    """Return the figures of answers; None if they need a base that is not known."""
    has_reference = by.objective.has_reference or not by.objective.has_pairs or answers.is_desirable is not None
    if has_reference and answers.reference_nll is None:
        return None
    return _of_pairs(answers, by) if answers.is_desirable is None else _of_labels(answers, by)


def _of_pairs(answers: AnswerLosses, by: ComparedBy) -> AnswerFigures:
    import torch

    from qlora_cli.loss.preference_loss import CHOSEN_REWARDS, PAIR_LOSSES, REJECTED_REWARDS

    objective = by.objective if by.objective.has_pairs else Objective.DPO
    loss = PAIR_LOSSES[objective]
    sizes = answers.tokens if loss.is_by_token else 1
    policy = torch.from_numpy(-answers.nll / sizes)
    reference = None
    if objective.has_reference:
        assert answers.reference_nll is not None, "checked before"
        reference = torch.from_numpy(-answers.reference_nll / sizes)
    pairs = loss.compute(policy, reference, by.beta)
    chosen, rejected = (pairs.metrics[name].numpy() for name in (CHOSEN_REWARDS, REJECTED_REWARDS))
    return AnswerFigures(
        losses=pairs.losses.numpy() if by.objective.has_pairs else None,
        rewards=np.stack([chosen, rejected], 1).reshape(-1),
        is_chosen=answers.is_chosen,
        is_right=chosen > rejected,
        baseline=None,
    )


def _of_labels(answers: AnswerLosses, by: ComparedBy) -> AnswerFigures:
    import torch

    from qlora_cli.loss.label_loss import LabelLoss

    assert answers.reference_nll is not None, "checked before"
    assert answers.is_desirable is not None, "they have labels"
    policy, reference = -answers.nll, -answers.reference_nll
    baseline = baselines(answers)
    loss = LabelLoss(beta=by.beta, desirable_weight=by.desirable_weight, undesirable_weight=by.undesirable_weight)
    given = (torch.from_numpy(policy), torch.from_numpy(reference))
    losses = loss.losses(*given, answers.is_desirable.tolist(), torch.from_numpy(baseline))
    rewards = by.beta * (policy - reference)
    above, below = rewards > by.beta * baseline, rewards < by.beta * baseline
    return AnswerFigures(
        losses=losses.numpy() if by.objective.has_labels else None,
        rewards=rewards,
        is_chosen=answers.is_desirable,
        is_right=np.where(answers.is_desirable, above, below),
        baseline=baseline,
    )


def baselines(answers: AnswerLosses) -> Values:
    """Return the baseline of each answer with a label, in nats, `(rows,)`: that of its group."""
    import torch

    from qlora_cli.loss.label_loss import baseline_of

    assert answers.gain is not None, "measured with the base"
    assert answers.rows_per_baseline is not None, "they have labels"
    size = answers.rows_per_baseline
    groups = [torch.from_numpy(answers.gain[start : start + size]) for start in range(0, len(answers.gain), size)]
    return np.concatenate([np.full(len(group), float(baseline_of(group.sum(), len(group)))) for group in groups])
