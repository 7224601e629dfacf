"""Cross-entropy of the output head by chunks of tokens, with the gradient made in the forward pass.

The logits of a chunk become the gradient of the chunk's loss in place, and are multiplied with the head at once. So a
token takes two products with the head, 4 · vocabulary · hidden FLOPs, instead of the three of a backward pass that
recomputes the logits; and each sum over the vocabulary is inside one product, which rounds it once.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_cli.loss.output_head import OutputHead

MIB = 1024**2
# A chunk has as many tokens as have this many bytes of logits in the compute dtype, but no fewer than `CHUNK_TOKENS`:
# each weight that is read serves as many products, and a GPU is limited by arithmetic from about 200 on (H200; 165 on
# an RTX 4090). Logits of 256 tokens are a few percent of the head itself. On a CPU, 128 tokens take 9 % longer than
# 256, and 512 take as long.
CHUNK_BYTES, CHUNK_TOKENS = 64 * MIB, 256
# Of the fp32 logits that one kernel works on, of which two or three exist at once: enough to fill a GPU. A CPU gets
# fewer, which stay in a cache, but rows for several threads; 1 to 16 MiB differ by 5 % of the loss's time there.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 8 * MIB, 32 * MIB
# The probability of one of 100,000 tokens is below the smallest normal number of fp16.
FP16_SHIFT = 256.0  # a power of two, so that nothing is rounded

# Returns the chunks to compute of a number of tokens, given their size.
Chunks = Callable[[int, int], Iterable[slice]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLosses:
    """The losses of the trained tokens, `(tokens,)` each, and their sum.

    Attributes:
        total: The sum of `nll`, or of `nll` weighted by probability, in fp32; it has a gradient.
        nll: The negative log-likelihood of each target, in nats, in fp32. Where the sum is not weighted, it has a
            gradient, of the hidden states only: what is computed of it can't train a part of the head.
        entropy: The entropy of each predicted distribution, in nats, in fp32.
        is_top1: Whether the target is the most likely token; the first one, if several are.
    """

    total: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def slices(length: int, size: int) -> Iterator[slice]:
    """Return the slices of `length`, of `size` each but for the last."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def trained_tokens(labels: torch.Tensor, ignore_index: int = -100) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the trained tokens are predicted, and what they are, `(tokens,)` each.

    `labels` are `(batch, seq)`, not shifted; a position is an index of `(batch * seq)`.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index).flatten()
    positions = (shifted != ignore_index).nonzero().squeeze(1)
    return positions, shifted[positions]


def token_losses(
    hidden: torch.Tensor,
    head: OutputHead,
    positions: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    chunks: Chunks = slices,
    *,
    weighs_by_probability: bool = False,
) -> TokenLosses:
    """Return the losses of `targets` at `positions` of `hidden`, whose logits are computed in `dtype`.

    `hidden` are the last hidden states, `(batch, seq, hidden)`; `positions` and `targets` are `(tokens,)`. The
    gradients of the hidden states, and of the parts of the head that are trained, are made here and scaled in the
    backward pass, which a graph allows once. Without a graph, none is made. `chunks` are those that are computed.
    With `weighs_by_probability`, the loss of each token is multiplied with the probability of its target, which is
    taken as a constant: Dynamic Fine-Tuning, arXiv 2508.05629.
    """
    flat = hidden.flatten(0, -2)
    trained = (flat, head.weight, head.bias, None if head.rows is None else head.rows.values)
    apply: Any = _ChunkedLoss.apply
    if not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in trained)):
        result = _forward(flat, head, positions, targets, dtype, _Gradients(), chunks)
        total = _total(result[0], weighs_by_probability=weighs_by_probability)
        return TokenLosses(total=total, nll=result[0], entropy=result[1], is_top1=result[2])
    total, nll, entropy, is_top1 = apply(*trained, head, positions, targets, dtype, chunks, weighs_by_probability)
    return TokenLosses(total=total, nll=nll, entropy=entropy, is_top1=is_top1)


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """The gradients of the summed loss that are to be made, before scaling; None for those that are not.

    With `weighs_by_probability`, it is the sum of the weighted losses.
    """

    weighs_by_probability: bool = False
    hidden: torch.Tensor | None = None  # (batch * seq, hidden), in the dtype of the hidden states
    weight: torch.Tensor | None = None  # (vocabulary, hidden), in fp32
    bias: torch.Tensor | None = None  # (vocabulary,), in fp32
    rows: torch.Tensor | None = None  # (rows, hidden), in fp32

    @property
    def are_any(self) -> bool:
        return any(one is not None for one in (self.hidden, self.weight, self.bias, self.rows))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        head: OutputHead,
        positions: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        chunks: Chunks,
        weighs_by_probability: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Return the summed loss, and three values of each token."""

        def zeros(index: int, like: torch.Tensor | None, dtype: torch.dtype | None = torch.float32) -> Any:
            return torch.zeros_like(like, dtype=dtype) if ctx.needs_input_grad[index] and like is not None else None

        gradients = _Gradients(
            weighs_by_probability=weighs_by_probability,
            hidden=zeros(0, hidden, hidden.dtype),
            weight=zeros(1, weight),
            bias=zeros(2, bias),
            rows=zeros(3, rows),
        )
        nll, entropy, is_top1 = _forward(hidden, head, positions, targets, dtype, gradients, chunks)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, gradients.rows, positions)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.shift = head.scale, _shift_of(dtype)
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, weight, bias, rows)]
        # Of weighted losses, only the sum has the gradient that was made.
        ctx.mark_non_differentiable(*([nll] if weighs_by_probability else []), entropy, is_top1)
        return _total(nll, weighs_by_probability=weighs_by_probability), nll, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_total: torch.Tensor | None, of_nll: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients in place, by factors in fp32: that of a loss scaler exceeds the range of fp16."""
        *made, positions = ctx.saved_tensors
        factor = (ctx.scale / ctx.shift) * _sum_of(of_total, of_nll).float()
        if of_nll is not None:
            of_hidden, *of_head = made
            assert all(one is None for one in of_head), "summed over tokens already, which have factors of their own"
            factor = factor.new_zeros(len(of_hidden)).index_copy_(0, positions, factor)
        scaled = [
            None if one is None else _scale_(one, factor).to(dtype)
            for one, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def _forward(
    hidden: torch.Tensor,
    head: OutputHead,
    positions: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    gradients: _Gradients,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses, entropies and whether the target is the most likely token; add up the gradients."""
    weight = head.merged_weight(dtype)
    num_tokens, vocabulary = len(targets), weight.shape[0]
    nll, entropy = (torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    is_top1 = torch.empty(num_tokens, dtype=torch.bool, device=hidden.device)
    size = max(1, min(num_tokens, chunk_tokens(vocabulary, dtype)))
    buffer = torch.empty((size, vocabulary), dtype=dtype, device=hidden.device)
    for chunk in chunks(num_tokens, size):
        states = hidden.index_select(0, positions[chunk]).to(dtype)
        logits = torch.mm(states, weight.t(), out=buffer[: len(states)])
        if head.bias is not None:
            logits += head.bias.to(dtype)
        for block in slices(len(states), block_tokens(vocabulary, hidden.device)):
            of_block = slice(chunk.start + block.start, chunk.start + block.stop)
            nll[of_block], entropy[of_block], is_top1[of_block] = _evaluate(
                logits[block], head, targets[of_block], gradients
            )
        if gradients.hidden is not None:
            gradients.hidden.index_copy_(0, positions[chunk], torch.mm(logits, weight).to(hidden.dtype))
        if gradients.weight is not None:
            _add_product(gradients.weight, logits.t(), states)
        if gradients.rows is not None and head.rows is not None:
            _add_product(gradients.rows, logits[:, head.rows.ids].t(), states)
        if gradients.bias is not None:
            gradients.bias.add_(logits.sum(0, dtype=torch.float32))
    return nll, entropy, is_top1


def _total(nll: torch.Tensor, *, weighs_by_probability: bool) -> torch.Tensor:
    return (torch.exp(-nll) * nll).sum() if weighs_by_probability else nll.sum()


def _evaluate(
    logits: torch.Tensor, head: OutputHead, targets: torch.Tensor, gradients: _Gradients
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, entropy and top-1 of each row of products with the head, `(tokens, vocabulary)`.

    If any of the `gradients` are to be made, that of the summed loss replaces `logits`, without the head's scale and
    times `_shift_of` their dtype.
    """
    makes_gradient = gradients.are_any
    values = logits.float()  # in fp32, the logits themselves
    if head.scale != 1:
        values *= head.scale
    slope = None
    if head.soft_cap is not None:
        tanh = values.div_(head.soft_cap).tanh_()
        values = tanh * head.soft_cap
        slope = tanh.square_().neg_().add_(1) if makes_gradient else None
    log_probs = torch.log_softmax(values, -1)
    of_targets = log_probs.gather(1, targets[:, None]).squeeze(1)
    is_top1 = log_probs.argmax(-1) == targets
    probs = torch.exp(log_probs, out=values)
    entropy = log_probs.mul_(probs).sum(-1).neg_()
    if makes_gradient:
        probs[torch.arange(len(targets), device=targets.device), targets] = torch.expm1(of_targets)
        if slope is not None:
            probs *= slope
        if gradients.weighs_by_probability:  # in fp32, and before fp16 loses what is small in comparison with 1
            probs *= torch.exp(of_targets)[:, None]
        if (shift := _shift_of(logits.dtype)) != 1:
            probs *= shift
        logits.copy_(probs)
    return -of_targets, entropy, is_top1


def chunk_tokens(vocabulary: int, dtype: torch.dtype) -> int:
    """Return the tokens of a chunk, a multiple of `CHUNK_TOKENS`."""
    tokens = CHUNK_BYTES // (vocabulary * dtype.itemsize)
    return max(CHUNK_TOKENS, tokens - tokens % CHUNK_TOKENS)


def block_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the tokens whose fp32 logits one kernel works on; the meta device has those of a GPU."""
    num_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1, num_bytes // (vocabulary * torch.float32.itemsize))


def _shift_of(dtype: torch.dtype) -> float:
    return FP16_SHIFT if dtype == torch.float16 else 1.0


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total`, in fp32, without rounding the product to the dtype of its factors."""
    if left.dtype == torch.float32 or total.device.type == "cpu":
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _sum_of(of_total: torch.Tensor | None, of_nll: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient of the tokens' losses: a scalar for all of them, or `(tokens,)`."""
    if of_total is None or of_nll is None:
        given = of_total if of_nll is None else of_nll
        assert given is not None, "a backward pass comes from the sum or from the losses"
        return given
    return of_total + of_nll


def _scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply `tensor`, `(rows, …)`, in place by fp32 numbers, which are not rounded to the dtype of `tensor`.

    `factor` is a scalar, or one number for each row of a matrix, `(rows,)`.
    """
    factor = factor if factor.dim() == 0 else factor[:, None]
    if tensor.dtype == torch.float32:
        return tensor.mul_(factor)
    size = max(1, GPU_BLOCK_BYTES // (tensor[:1].numel() * torch.float32.itemsize))
    for rows in slices(len(tensor), size):
        tensor[rows] = tensor[rows].float().mul_(factor if factor.dim() == 0 else factor[rows])
    return tensor
