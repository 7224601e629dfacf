"""The loss of a batch in training: the layers of the model, then our head and loss; and what TRL reports about it.

The sums stay on the device. Each value that the host reads makes it wait for the GPU, which then waits for the host to
start the next kernels; so TRL's metrics are read together, once in a step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qlora_cli.loss.chunked_loss import token_losses
from qlora_cli.loss.output_head import backbone_of, check_head, compute_dtype, gathered_head


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchLosses:
    """Sums over the trained tokens of a batch, tensors of one number.

    Attributes:
        total: The negative log-likelihood of the targets, in nats; it has a gradient.
        entropy: The entropy of the predicted distributions, in nats.
        num_correct: The number of targets that are the most likely token.
        num_trained: The number of trained tokens.
        aux_loss: How unevenly tokens are distributed over experts, if that was asked for; it has a gradient.
    """

    total: torch.Tensor
    entropy: torch.Tensor
    num_correct: torch.Tensor
    num_trained: int
    aux_loss: torch.Tensor | None


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

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of `targets` at `positions`, `(tokens,)` each, as `trained_tokens` returns them."""
        with self._autocast():
            outputs = self._backbone(**inputs)
            hidden = outputs.last_hidden_state
            with gathered_head(self._model) as head:
                device = head.weight.device
                losses = token_losses(
                    hidden.to(device), head, positions.to(device), targets.to(device), compute_dtype(hidden)
                )
        return BatchLosses(
            total=losses.total,
            entropy=losses.entropy.sum(),
            num_correct=losses.is_top1.sum(),
            num_trained=len(targets),
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


class PendingMetrics:
    """The metrics that TRL reports, of batches that are not read yet, and the number of their tokens."""

    def __init__(self) -> None:
        self._batches: list[tuple[int, torch.Tensor]] = []  # trained tokens, and the sums
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, losses: BatchLosses, num_tokens: int) -> None:
        """Add a batch of `num_tokens` tokens, without padding."""
        self.num_tokens += num_tokens
        sums = [losses.entropy, losses.num_correct, *([] if losses.aux_loss is None else [losses.aux_loss])]
        self._batches.append((losses.num_trained, torch.stack([one.detach().float() for one in sums])))

    def clear(self) -> None:
        """Forget the batches."""
        self._batches.clear()
        self.num_tokens = 0

    def read(self, *others: torch.Tensor) -> tuple[list[dict[str, float]], list[float]]:
        """Return the metrics of each batch by TRL's names, and the values of `others`, in one transfer; forget them.

        `others` are tensors of one number in fp32, on the same device.
        """
        parts = [*(sums for _, sums in self._batches), *(other.detach().reshape(1) for other in others)]
        values: list[float] = torch.cat(parts).tolist() if parts else []
        metrics, start = [], 0
        for num_trained, sums in self._batches:
            entropy, num_correct, *aux = values[start : start + len(sums)]
            start += len(sums)
            tokens = max(1, num_trained)
            metrics.append({"entropy": entropy / tokens, "mean_token_accuracy": num_correct / tokens})
            if aux:
                metrics[-1]["aux_loss"] = aux[0]
        self.clear()
        return metrics, values[start:]
