"""The loss of a batch in training: the layers of the model, then our head and loss; and what TRL reports about it.

The sums stay on the device. Each value that the host reads makes it wait for the GPU, which then waits for the host to
start the next kernels; so TRL's metrics are read together, once in a step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qlora_cli.loss.chunked_loss import TokenLosses, token_losses
from qlora_cli.loss.output_head import backbone_of, check_head, compute_dtype, gathered_head
from qlora_cli.ranks.group import ProcessGroup

Autocast = Callable[[], AbstractContextManager[None]]
# Returns the metrics of a batch, by TRL's names, of its figures as numbers: the means of each are reported.
MetricsOf = Callable[[Sequence[float]], list[dict[str, float]]]
DFT_LOSS = "dft_loss"


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchLosses:
    """The losses of a batch.

    Attributes:
        total: The sum of the losses of its items, a tensor of one number. Its gradient is that of the loss that is
            trained on: its own, or that of `dft`.
        num_items: The number of items: trained tokens, or pairs or answers that are compared.
        aux_loss: How unevenly tokens are distributed over experts, if that was asked for; it has a gradient.
        figures: What its metrics follow from, `(figures,)`, in fp32, without a gradient.
        metrics_of: Returns the metrics of the values of `figures`.
        dft: The negative log-likelihood weighted by probability, if that is trained on.
    """

    total: torch.Tensor
    num_items: int
    aux_loss: torch.Tensor | None
    figures: torch.Tensor
    metrics_of: MetricsOf
    dft: torch.Tensor | None = None


def token_metrics(values: Sequence[float], num_trained: int) -> list[dict[str, float]]:
    """Return the metrics of trained tokens, of the sums of their entropies, in nats, and of those predicted right."""
    entropy, num_correct = values
    tokens = max(1, num_trained)
    return [{"entropy": entropy / tokens, "mean_token_accuracy": num_correct / tokens}]


class LossModel:
    """Calls the layers of `model`, without its head, and computes the losses of their last hidden states."""

    def __init__(self, model: PreTrainedModel, autocast: Autocast, *, trains_dft: bool) -> None:
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

    def begin_step(self, mismatched: Sequence[dict[str, Any]], num_rows: int, group: ProcessGroup) -> None:  # noqa: ARG002
        """Compute what the losses of a step need before its first micro-batch, of the inputs of further batches.

        The step has `num_rows` in all the processes of `group`, which share these batches.
        """
        assert not mismatched, "the losses of tokens need nothing"

    def __call__(self, *, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> BatchLosses:
        """Return the losses of `targets` at `positions`, `(tokens,)` each, as `trained_tokens` returns them."""
        is_dft = self._trains_dft and self._model.training  # held-out rows have the same loss in every run
        losses, outputs = self.token_losses(positions, targets, inputs, weighs_by_probability=is_dft)
        dft = losses.total.detach() if is_dft else None
        return BatchLosses(
            total=losses.total if dft is None else losses.nll.detach().sum() + (losses.total - dft),
            num_items=len(targets),
            aux_loss=self.balance(outputs, inputs),
            figures=torch.stack([losses.entropy.sum(), losses.is_top1.sum().float()]),
            metrics_of=partial(token_metrics, num_trained=len(targets)),
            dft=dft,
        )

    def token_losses(
        self,
        positions: torch.Tensor,
        targets: torch.Tensor,
        inputs: dict[str, Any],
        *,
        weighs_by_probability: bool = False,
    ) -> tuple[TokenLosses, Any]:
        """Return the losses of each of `targets`, and the outputs of the layers."""
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
                    weighs_by_probability=weighs_by_probability,
                )
        return losses, outputs

    def balance(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return how unevenly tokens are distributed over experts, as TRL computes it; None if not asked for."""
        if not inputs.get("output_router_logits"):
            return None
        config = self._model.config.get_text_config()
        loss = load_balancing_loss_func(
            outputs.router_logits, config.num_experts, config.num_experts_per_tok, inputs.get("attention_mask")
        )
        assert isinstance(loss, torch.Tensor), "there are router logits"
        return loss


class PendingMetrics:
    """The metrics that TRL reports, of batches that are not read yet, and the number of their tokens."""

    def __init__(self) -> None:
        self._batches: list[tuple[MetricsOf, torch.Tensor, dict[str, torch.Tensor]]] = []  # of figures; further ones
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, losses: BatchLosses, num_tokens: int, num_in_step: torch.Tensor) -> None:
        """Add a batch of `num_tokens` tokens, without padding, of a step that trains `num_in_step`."""
        self.num_tokens += num_tokens
        further = {} if losses.aux_loss is None else {"aux_loss": losses.aux_loss}
        if losses.dft is not None:
            further[DFT_LOSS] = losses.dft / num_in_step
        self._batches.append(
            (losses.metrics_of, losses.figures, {name: _single(one) for name, one in further.items()})
        )

    def clear(self) -> None:
        """Forget the batches."""
        self._batches.clear()
        self.num_tokens = 0

    def read(self, *others: torch.Tensor) -> tuple[list[dict[str, float]], list[float]]:
        """Return the metrics of each batch by TRL's names, and the values of `others`, in one transfer; forget them.

        `others` are tensors of one number in fp32, on the same device.
        """
        parts = [part for _, figures, further in self._batches for part in (figures, *further.values())]
        values: list[float] = torch.cat([*parts, *map(_single, others)]).tolist() if parts or others else []
        metrics, start = [], 0
        for metrics_of, figures, further in self._batches:
            end = start + len(figures)
            first, *rest = metrics_of(values[start:end])
            start = end + len(further)
            metrics += [first | dict(zip(further, values[end:start], strict=True)), *rest]
        self.clear()
        return metrics, values[start:]


def means_of_step(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of a step's micro-batches such that the mean of each is that of the step.

    That of `DFT_LOSS` is the sum of the parts of the micro-batches, which have different numbers of trained tokens.
    """
    return [
        {name: value * len(metrics) if name == DFT_LOSS else value for name, value in one.items()} for one in metrics
    ]


def _single(value: torch.Tensor) -> torch.Tensor:
    return value.detach().float().reshape(1)
