"""The loss of pairs in training: a pass with the adapter, after one through the base alone if that is the reference.

The base is there already: no second model is loaded, nothing is kept between steps, and a run that begins with an
adapter of zeros begins with exactly equal log-probabilities.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from qlora_cli.adapters.calls import disable_dropout, without_adapter
from qlora_cli.loss.preference_loss import CHOSEN_REWARDS, PAIR_LOSSES, REJECTED_REWARDS
from qlora_cli.settings.objectives import Objective
from qlora_cli.training.loss_model import Autocast, BatchLosses, LossModel
from qlora_cli.training.preferences.pair_batches import NUM_TRAINED_OF

ROUTING = "output_router_logits"  # asks for the balance of experts, which the reference has no part in


class PairModel(LossModel):
    """Computes the losses of a micro-batch of `PairCollator`, by an objective that compares."""

    def __init__(self, model: PeftModel, autocast: Autocast, *, objective: Objective, beta: float) -> None:
        """Compute in a context of `autocast`.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        super().__init__(model.get_base_model(), autocast, trains_dft=False)
        self._adapted = model
        self._loss = PAIR_LOSSES[objective]
        self._has_reference = objective.has_reference
        self._beta = beta
        disable_dropout(model)  # what is dropped would differ between what is compared

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of pairs; `inputs` have the number of trained tokens of each sequence, in order."""
        num_trained_of: Sequence[int] = inputs.pop(NUM_TRAINED_OF)
        reference = None
        if self._has_reference:
            of_reference = {name: value for name, value in inputs.items() if name != ROUTING}
            with without_adapter(self._adapted):
                losses, _ = self.token_losses(positions, targets, of_reference)
                reference = self._loss.log_probs(losses.nll, num_trained_of)
        losses, outputs = self.token_losses(positions, targets, inputs)
        pairs = self._loss.compute(self._loss.log_probs(losses.nll, num_trained_of), reference, self._beta)
        return BatchLosses(
            total=pairs.losses.sum(),
            num_items=len(num_trained_of) // 2,
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
    return {**metrics, "rewards/accuracies": float(margin > 0), "rewards/margins": margin}
