"""What computes the losses of sequences by their log-probabilities, those by the base among them.

The base is there already: no second model is loaded, nothing is kept between steps, and a run that begins with an
adapter of zeros begins with exactly equal log-probabilities.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from qlora_cli.adapters.calls import disable_dropout, without_adapter
from qlora_cli.loss.preference_loss import log_probs_of
from qlora_cli.training.loss_model import Autocast, LossModel

ROUTING = "output_router_logits"  # asks for the balance of experts, which the reference has no part in


class ComparingModel(LossModel):
    """A `LossModel` of sequences; `is_by_token`: their log-probabilities are means over tokens, or else sums."""

    def __init__(self, model: PeftModel, autocast: Autocast, *, is_by_token: bool) -> None:
        """Compute in a context of `autocast`.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        super().__init__(model.get_base_model(), autocast, trains_dft=False)
        self._adapted = model
        self._is_by_token = is_by_token
        disable_dropout(model)  # what is dropped would differ between what is compared

    def log_probs(
        self, positions: torch.Tensor, targets: torch.Tensor, inputs: dict[str, Any], num_trained: Sequence[int]
    ) -> tuple[torch.Tensor, Any]:
        """Return the log-probability of each sequence, `(sequences,)`, and the outputs of the layers.

        The sequences have `num_trained` of the tokens, in order.
        """
        losses, outputs = self.token_losses(positions, targets, inputs)
        return log_probs_of(losses.nll, num_trained, is_by_token=self._is_by_token), outputs

    def reference_log_probs(
        self, positions: torch.Tensor, targets: torch.Tensor, inputs: dict[str, Any], num_trained: Sequence[int]
    ) -> torch.Tensor:
        """Return the log-probability of each sequence by the base alone, without gradients."""
        of_reference = {name: value for name, value in inputs.items() if name != ROUTING}
        with without_adapter(self._adapted):
            return self.log_probs(positions, targets, of_reference, num_trained)[0]
