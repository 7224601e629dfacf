"""The model as TRL's trainer calls it for a loss: its layers, then our head and loss instead of TRL's.

`SFTTrainer.compute_loss`, which is used unchanged, takes the model as an argument, and computes loss and metrics from
sums over what it returns for each token.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from qlora_cli.loss.chunked_loss import token_losses, trained_tokens
from qlora_cli.loss.output_head import backbone_of, check_head, compute_dtype, output_head


class LossModel:
    """Calls the layers of `model`, without its head, and computes the losses of their last hidden states."""

    def __init__(self, model: PreTrainedModel, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        """Compute in a context of `autocast`.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        with autocast():
            check_head(model)
        self._model = model
        self._backbone = backbone_of(model)
        self._autocast = autocast

    def __call__(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> FusedCausalLMOutput:
        """Return losses and metrics of the trained tokens, `(tokens,)` each, but for the log-likelihood: its sum.

        `labels` are `(batch, seq)`, not shifted. TRL documents each field as `(batch, seq - 1)`, and sums all of them.
        """
        assert fused_lm_head, "TRL asks for logits only with settings that this project does not have"
        with self._autocast():
            outputs = self._backbone(**inputs)
            hidden, head = outputs.last_hidden_state, output_head(self._model)
            device = head.weight.device
            positions, targets = trained_tokens(labels.to(device))
            losses = token_losses(hidden.to(device), head, positions, targets, compute_dtype(hidden))
        return FusedCausalLMOutput(
            log_probs=-losses.total,
            entropy=losses.entropy,
            is_top1=losses.is_top1,
            label_mask=torch.ones_like(losses.is_top1),
            aux_loss=self._balance(outputs, inputs) if inputs.get("output_router_logits") else None,
        )

    def _balance(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return how unevenly tokens are distributed over experts, as TRL and transformers compute it."""
        config = self._model.config.get_text_config()
        loss = load_balancing_loss_func(
            outputs.router_logits, config.num_experts, config.num_experts_per_tok, inputs.get("attention_mask")
        )
        assert isinstance(loss, torch.Tensor), "there are router logits"
        return loss
