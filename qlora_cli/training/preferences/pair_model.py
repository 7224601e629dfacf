"""The loss of pairs in training: a pass with the adapter, after one through the base if that is the reference."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from qlora_cli.loss.preference_loss import ACCURACIES, CHOSEN_REWARDS, MARGINS, PAIR_LOSSES, REJECTED_REWARDS
from qlora_cli.settings.objectives import Objective
from qlora_cli.training.loss_model import Autocast, BatchLosses
from qlora_cli.training.preferences.comparing_model import ComparingModel
from qlora_cli.training.preferences.pair_batches import NUM_TRAINED_OF


class PairModel(ComparingModel):
    """Computes the losses of a micro-batch of `PairCollator`, by an objective that compares two answers."""

    def __init__(self, model: PeftModel, autocast: Autocast, *, objective: Objective, beta: float) -> None:
        """Compute in a context of `autocast`.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        self._loss = PAIR_LOSSES[objective]
        super().__init__(model, autocast, is_by_token=self._loss.is_by_token)
        self._has_reference = objective.has_reference
        self._beta = beta

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of pairs; `inputs` have the number of trained tokens of each sequence, in order."""
        numbers: Sequence[int] = inputs.pop(NUM_TRAINED_OF)
        reference = self.reference_log_probs(positions, targets, inputs, numbers) if self._has_reference else None
        policy, outputs = self.log_probs(positions, targets, inputs, numbers)
        pairs = self._loss.compute(policy, reference, self._beta)
        return BatchLosses(
            total=pairs.losses.sum(),
            num_items=len(numbers) // 2,
            aux_loss=self.balance(outputs, inputs),
            figures=torch.cat(list(pairs.metrics.values())),
            metrics_of=partial(pair_metrics, names=tuple(pairs.metrics)),
        )


def pair_metrics(values: Sequence[float], names: Sequence[str]) -> list[dict[str, float]]:
    """Return the metrics of each pair by TRL's names, of the values of all pairs, name after name."""
    num_pairs = len(values) // len(names)
    columns = [values[start : start + num_pairs] for start in range(0, len(values), num_pairs)]
    return [_with_margin(dict(zip(names, of_pair, strict=True))) for of_pair in zip(*columns, strict=True)]


def _with_margin(metrics: dict[str, float]) -> dict[str, float]:
    margin = metrics[CHOSEN_REWARDS] - metrics[REJECTED_REWARDS]
    return {**metrics, ACCURACIES: float(margin > 0), MARGINS: margin}
