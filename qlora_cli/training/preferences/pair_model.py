"""The loss of pairs in training: a pass through the base alone, then one with its adapter, in one micro-batch.

The base is the reference that the adapter is trained against, and is there already: no second model is loaded, nothing
is kept between steps, and a run that begins with an adapter of zeros begins with exactly equal log-probabilities.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from qlora_cli.adapters.calls import disable_dropout, without_adapter
from qlora_cli.loss.preference_loss import dpo_losses, log_probs_of_sequences
from qlora_cli.training.loss_model import Autocast, BatchLosses, LossModel
from qlora_cli.training.preferences.pair_batches import NUM_TRAINED_OF

ROUTING = "output_router_logits"  # asks for the balance of experts, which the reference has no part in


class PairModel(LossModel):
    """Computes the DPO losses of a micro-batch of `PairCollator`."""

    def __init__(self, model: PeftModel, autocast: Autocast, *, beta: float) -> None:
        """Compute in a context of `autocast`.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        super().__init__(model.get_base_model(), autocast, trains_dft=False)
        self._adapted = model
        self._beta = beta
        disable_dropout(model)  # what is dropped would differ between the passes that are compared

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of pairs; `inputs` have the number of trained tokens of each sequence, in order."""
        num_trained_of: Sequence[int] = inputs.pop(NUM_TRAINED_OF)
        of_reference = {name: value for name, value in inputs.items() if name != ROUTING}
        with without_adapter(self._adapted):
            losses, _ = self.token_losses(positions, targets, of_reference)
            reference = log_probs_of_sequences(losses.nll, num_trained_of)
        losses, outputs = self.token_losses(positions, targets, inputs)
        policy = log_probs_of_sequences(losses.nll, num_trained_of)
        pairs = dpo_losses(policy, reference, self._beta)
        return BatchLosses(
            total=pairs.losses.sum(),
            num_items=len(num_trained_of) // 2,
            aux_loss=self.balance(outputs, inputs),
            figures=torch.cat([pairs.chosen_rewards, pairs.rejected_rewards, policy.detach()]),
            metrics_of=pair_metrics,
        )


def pair_metrics(values: Sequence[float]) -> list[dict[str, float]]:
    """Return the metrics of each pair by TRL's names, of the figures of a batch."""
    num_pairs = len(values) // 4
    chosen, rejected = values[:num_pairs], values[num_pairs : 2 * num_pairs]
    log_probs = values[2 * num_pairs :]
    return [
        {
            "rewards/chosen": chosen[pair],
            "rewards/rejected": rejected[pair],
            "rewards/accuracies": float(chosen[pair] > rejected[pair]),
            "rewards/margins": chosen[pair] - rejected[pair],
            "logps/chosen": log_probs[2 * pair],
            "logps/rejected": log_probs[2 * pair + 1],
        }
        for pair in range(num_pairs)
    ]
