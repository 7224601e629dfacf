"""The loss of answers with labels in training: a pass through the base, then one with the adapter.

Before the first micro-batch of a step, both compute answers to prompts that are not theirs: the baseline, which all
rows of the step are compared with, so that it does not depend on how the step is divided.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from qlora_cli.loss.label_loss import KL, LabelLoss, baseline_of
from qlora_cli.loss.preference_loss import (
    ACCURACIES,
    CHOSEN_LOG_PROBS,
    CHOSEN_REWARDS,
    REJECTED_LOG_PROBS,
    REJECTED_REWARDS,
)
from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.training.loss_model import Autocast, BatchLosses
from qlora_cli.training.preferences.comparing_model import ComparingModel
from qlora_cli.training.preferences.label_batches import DESIRABLE
from qlora_cli.training.preferences.pair_batches import NUM_TRAINED_OF


class LabelModel(ComparingModel):
    """Computes the losses of a micro-batch of `LabelCollator`, by the baseline of its step."""

    def __init__(self, model: PeftModel, autocast: Autocast, loss: LabelLoss) -> None:
        """Compute in a context of `autocast`.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        super().__init__(model, autocast, is_by_token=False)
        self._loss = loss
        self._baseline = torch.zeros(())

    @torch.no_grad()
    def begin_step(self, mismatched: Sequence[dict[str, Any]], num_rows: int, group: ProcessGroup) -> None:
        """Compute the baseline of a step, by the inputs of its batches of answers to other prompts.

        An answer of no trained token adds nothing.
        """
        gains = []
        for batch in mismatched:
            inputs = {name: value for name, value in batch.items() if name not in (NUM_TRAINED_OF, DESIRABLE)}
            of_batch = inputs.pop("positions"), inputs.pop("targets"), inputs, batch[NUM_TRAINED_OF]
            reference = self.reference_log_probs(*of_batch)
            gains.append((self.log_probs(*of_batch)[0] - reference).sum())
        gain = torch.stack(gains).sum() if gains else torch.zeros(())
        if group.size > 1:
            gain = torch.tensor(sum(group.exchange(float(gain))))
        self._baseline = baseline_of(gain, num_rows)

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of answers; `inputs` say how many trained tokens each has, and whether it is wanted."""
        numbers, is_desirable = inputs.pop(NUM_TRAINED_OF), inputs.pop(DESIRABLE)
        reference = self.reference_log_probs(positions, targets, inputs, numbers)
        policy, outputs = self.log_probs(positions, targets, inputs, numbers)
        baseline = self._baseline.to(policy.device)
        losses = self._loss.losses(policy, reference, is_desirable, baseline)
        rewards = self._loss.beta * (policy.detach() - reference)
        return BatchLosses(
            total=losses.sum(),
            num_items=len(numbers),
            aux_loss=self.balance(outputs, inputs),
            figures=torch.cat([baseline[None], rewards, policy.detach()]),
            metrics_of=partial(label_metrics, is_desirable=is_desirable, beta=self._loss.beta),
        )


def label_metrics(values: Sequence[float], is_desirable: Sequence[bool], beta: float) -> list[dict[str, float]]:
    """Return the metrics of each answer by TRL's names; those of wanted and unwanted ones have different names.

    `values` are the baseline, in nats, the rewards of all answers, and their log-probabilities. An answer is judged
    right if its reward is on the side of the baseline that its label asks for.
    """
    baseline, rest = values[0], values[1:]
    rewards, log_probs = rest[: len(is_desirable)], rest[len(is_desirable) :]
    return [
        {
            CHOSEN_REWARDS if wanted else REJECTED_REWARDS: reward,
            CHOSEN_LOG_PROBS if wanted else REJECTED_LOG_PROBS: log_prob,
            ACCURACIES: float(reward > beta * baseline if wanted else reward < beta * baseline),
            KL: baseline,
        }
        for wanted, reward, log_prob in zip(is_desirable, rewards, log_probs, strict=True)
    ]
