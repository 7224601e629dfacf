"""The loss of a batch in training: the layers of the model, then our head and loss; and what TRL reports about it.

The sums stay on the device. Each value that the host reads makes it wait for the GPU, which then waits for the host to
start the next kernels; so TRL's metrics are read together, once in a step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qlora_cli.loss.chunked_loss import token_losses
from qlora_cli.loss.output_head import backbone_of, check_head, compute_dtype, gathered_head

# The metrics that are means over the trained tokens of a batch, by TRL's names, and of which sums.
MEANS = {"entropy": "entropy", "mean_token_accuracy": "num_correct"}
DFT_LOSS = "dft_loss"


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchLosses:
    """Sums over the trained tokens of a batch, tensors of one number.

    Attributes:
        total: The negative log-likelihood of the targets, in nats. Its gradient is that of the loss that is trained
            on: its own, or that of `dft`.
        entropy: The entropy of the predicted distributions, in nats.
        num_correct: The number of targets that are the most likely token.
        num_trained: The number of trained tokens.
        aux_loss: How unevenly tokens are distributed over experts, if that was asked for; it has a gradient.
        dft: The negative log-likelihood weighted by probability, if that is trained on.
    """

    total: torch.Tensor
    entropy: torch.Tensor
    num_correct: torch.Tensor
    num_trained: int
    aux_loss: torch.Tensor | None
    dft: torch.Tensor | None


class LossModel:
    """Calls the layers of `model`, without its head, and computes the losses of their last hidden states."""

    def __init__(
        self, model: PreTrainedModel, autocast: Callable[[], AbstractContextManager[None]], *, trains_dft: bool
    ) -> None:
        """Compute in a context of `autocast`; with `trains_dft`, weight the tokens that are trained by probability.

        Raises:
            ModelError: the loss of this model can't be computed so.
        """
        with autocast():
            check_head(model)
        self._model = model
        self._backbone = backbone_of(model)
        self._autocast = autocast
        self._trains_dft = trains_dft

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of `targets` at `positions`, `(tokens,)` each, as `trained_tokens` returns them."""
        is_dft = self._trains_dft and self._model.training  # held-out rows have the same loss in every run
        with self._autocast():
            outputs = self._backbone(**inputs)
            hidden = outputs.last_hidden_state
            with gathered_head(self._model) as head:
                device = head.weight.device
                losses = token_losses(
                    hidden.to(device),
                    head,
                    positions.to(device),
                    targets.to(device),
                    compute_dtype(hidden),
                    weighs_by_probability=is_dft,
                )
        dft = losses.total.detach() if is_dft else None
        return BatchLosses(
            total=losses.total if dft is None else losses.nll.sum() + (losses.total - dft),
            entropy=losses.entropy.sum(),
            num_correct=losses.is_top1.sum(),
            num_trained=len(targets),
            aux_loss=self._balance(outputs, inputs) if inputs.get("output_router_logits") else None,
            dft=dft,
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
        self._batches: list[tuple[int, tuple[str, ...], torch.Tensor]] = []  # trained tokens, names, values
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, losses: BatchLosses, num_tokens: int, num_in_step: torch.Tensor) -> None:
        """Add a batch of `num_tokens` tokens, without padding, of a step that trains `num_in_step`."""
        self.num_tokens += num_tokens
        values = {name: getattr(losses, of_sum) for name, of_sum in MEANS.items()}
        if losses.aux_loss is not None:
            values["aux_loss"] = losses.aux_loss
        if losses.dft is not None:
            values[DFT_LOSS] = losses.dft / num_in_step
        stacked = torch.stack([one.detach().float() for one in values.values()])
        self._batches.append((losses.num_trained, tuple(values), stacked))

    def clear(self) -> None:
        """Forget the batches."""
        self._batches.clear()
        self.num_tokens = 0

    def read(self, *others: torch.Tensor) -> tuple[list[dict[str, float]], list[float]]:
        """Return the metrics of each batch by TRL's names, and the values of `others`, in one transfer; forget them.

        `others` are tensors of one number in fp32, on the same device.
        """
        parts = [*(batch[-1] for batch in self._batches), *(other.detach().reshape(1) for other in others)]
        values: list[float] = torch.cat(parts).tolist() if parts else []
        metrics, start = [], 0
        for num_trained, names, _ in self._batches:
            of_batch = dict(zip(names, values[start : start + len(names)], strict=True))
            metrics.append(of_batch | {name: of_batch[name] / max(1, num_trained) for name in MEANS})
            start += len(names)
        self.clear()
        return metrics, values[start:]


def means_of_step(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of a step's micro-batches such that the mean of each is that of the step.

    That of `DFT_LOSS` is the sum of the parts of the micro-batches, which have different numbers of trained tokens.
    """
    return [
        {name: value * len(metrics) if name == DFT_LOSS else value for name, value in one.items()} for one in metrics
    ]
