"""TRL's fused head and chunked loss, with the allocations that they make on a GPU.

`trl.kernels.chunked_logprob` reduces tiles of logits to statistics: on a GPU by one Triton kernel, elsewhere by many
operations with temporaries. This module allocates what the GPU's code does, and a trace on the meta device sees it.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError

TOKEN_CHUNK = 4096  # TOKEN_CHUNK_SIZE
VOCABULARY_CHUNK = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl.trainer.utils
NUM_STATISTICS = 7  # a running maximum, sums and the target's logit: one fp32 number each per token


def fused_loss(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], compute_dtype: torch.dtype
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the loss of a batch in which every token is trained, and the tensors that TRL computes metrics from.

    `batch` has `input_ids` and `labels`, `(batch, seq)`; metrics are computed from tensors of `(batch, seq - 1)`.

    Raises:
        ModelError: TRL's loss does not work for the model.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    backbone: Any = model.base_model
    if backbone is model:  # TRL's trainer fails here, too
        raise ModelError(
            f"TRL's loss does not find the layers of {type(model).__name__}, and can't train it",
            hint="Its class does not name them by base_model_prefix; choose another model.",
        )
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    # Indexing by a boolean mask computes the indices where it is true, int64, one row for each dimension. Here it is
    # true everywhere.
    indices = torch.zeros((mask.numel(), mask.dim()), dtype=torch.long, device=mask.device).unbind(1)
    head = model.get_output_embeddings()
    apply: Any = _ChunkedLogProbs.apply
    outputs = apply(hidden[indices], head.weight, labels[indices], compute_dtype)
    log_probs, *metrics = (value.new_zeros(mask.shape).masked_scatter(mask, value) for value in outputs)
    loss = -log_probs.sum() / mask.sum()
    return loss, (log_probs, *metrics, mask)


class _ChunkedLogProbs(torch.autograd.Function):
    """`ChunkedLogProbFunction` of TRL as it allocates on a GPU; returns log-probabilities, entropy and `is_top1`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compute_dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        """Project `hidden`, `(tokens, hidden)`, on `weight`, `(vocabulary, hidden)`, tile by tile."""
        num_tokens = hidden.shape[0]
        statistics = [
            torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(NUM_STATISTICS)
        ]
        _tiles(hidden, weight, compute_dtype)
        log_z = statistics[0] + statistics[1]
        log_probs, entropy = statistics[2] - log_z, log_z - statistics[3]
        is_top1 = log_probs >= entropy
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.compute_dtype = compute_dtype
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Recompute the tiles, and sum the gradient of `hidden` in fp32."""
        hidden, weight, _, _, _ = ctx.saved_tensors
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # if rows of the head are trained: a gradient of all of them, in fp32
            weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        _tiles(hidden, weight, ctx.compute_dtype, gradient)
        return (
            gradient.to(hidden.dtype),
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None,
            None,
        )


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, compute_dtype: torch.dtype, gradient: torch.Tensor | None = None
) -> None:
    num_tokens, vocabulary = hidden.shape[0], weight.shape[0]
    buffer = hidden.new_empty((min(num_tokens, TOKEN_CHUNK), VOCABULARY_CHUNK), dtype=compute_dtype)
    for start in range(0, num_tokens, TOKEN_CHUNK):
        rows = slice(start, min(start + TOKEN_CHUNK, num_tokens))
        chunk = hidden[rows].to(compute_dtype)
        for first in range(0, vocabulary, VOCABULARY_CHUNK):
            columns = weight[first : first + VOCABULARY_CHUNK].to(compute_dtype)
            tile = buffer[: chunk.shape[0], : columns.shape[0]]
            torch.mm(chunk, columns.t(), out=tile)
            if gradient is not None:
                _add_product(gradient[rows], tile, columns)


def _add_product(total: torch.Tensor, tile: torch.Tensor, columns: torch.Tensor) -> None:
    # cuBLAS adds the product of 16-bit factors to an fp32 sum (`addmm` with `out_dtype`) without a temporary.
    if total.dtype == tile.dtype:
        torch.addmm(total, tile, columns, out=total)
