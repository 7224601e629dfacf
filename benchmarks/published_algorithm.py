"""The operations of Unsloth's published training step, by arithmetic, to compare a traced step with.

Published are (the project's blog and kernels, Apache-2.0): LoRA's products and their gradients in one autograd
function, which adds them to the base's in place; one kernel each for RMSNorm, RoPE and SwiGLU, forward and backward;
whole layers recomputed in the backward pass; a loss whose gradient is computed together with it. Everything else,
such as the sums of the residual stream, is as in any step. Where a description is silent, the cheaper way is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qlora_cli.memory.tracing.operations import BACKWARD_PRODUCTS, CAUSAL_SHARE, num_tiles
from qlora_cli.quantization.methods.skip_modules import linear_layers
from qlora_cli.timing.operation import Operation, OperationKind, Pass

BYTES = 2  # of a number in 16 bit
CODE_BYTES = 0.5  # of a weight in 4 bit
CONSTANT_BYTES = 1 / 64  # of a weight: an 8-bit scale for 64
PRODUCT_PASSES = 2  # forward, and the gradient of the activations


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step computes with: `linears` are `(in, out)` of every linear layer, in all layers, without the head."""

    linears: tuple[tuple[int, int], ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rank: int
    rows: int
    length: int

    @property
    def num_tokens(self) -> int:
        """The tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def num_weights(self) -> int:
        """The weights of the linear layers."""
        return sum(wide * narrow for wide, narrow in self.linears)


def shape_of(model: PreTrainedModel, *, rank: int, rows: int, length: int) -> StepShape:
    """Return the shape of a step of a dense decoder, which may be on the meta device."""
    config, head = model.config, model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    linears = [layer for _, layer in linear_layers(model) if layer is not head]
    return StepShape(
        linears=tuple((int(layer.weight.shape[1]), int(layer.weight.shape[0])) for layer in linears),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=head.out_features,
        rank=rank,
        rows=rows,
        length=length,
    )


def floor_flops(shape: StepShape) -> int:
    """Return the FLOPs without which there is no step: each base product and the head, forward and backward."""
    head = shape.vocab_size * shape.hidden_size
    return 2 * PRODUCT_PASSES * shape.num_tokens * (shape.num_weights + head)


def published_operations(shape: StepShape) -> list[Operation]:
    """Return the operations of one micro-batch, without the optimizer's."""
    operations: list[Operation] = []
    for run_in in (Pass.FORWARD, Pass.RECOMPUTE, Pass.BACKWARD):
        for wide, narrow in shape.linears:
            operations += _linear(shape, wide, narrow, run_in)
        for _ in range(shape.num_layers):
            operations += _layer(shape, run_in)
    return [*operations, *_loss(shape)]


def _linear(shape: StepShape, wide: int, narrow: int, run_in: Pass) -> Iterator[Operation]:
    """Yield a linear layer of `wide` inputs and `narrow` outputs with its adapter."""
    tokens, rank, weights = shape.num_tokens, shape.rank, wide * narrow
    stored = round(weights * (CODE_BYTES + CONSTANT_BYTES))
    yield Operation(run_in, OperationKind.DEQUANTIZATION, "dequantize", 0, stored + weights * BYTES, 3)
    base_bytes = (tokens * (wide + narrow) + weights) * BYTES
    tiles = num_tiles(tokens, wide if run_in == Pass.BACKWARD else narrow)
    yield Operation(run_in, OperationKind.BASE_GEMM, "product", 2 * tokens * weights, base_bytes, 1, tiles=tiles)
    if run_in != Pass.BACKWARD:
        yield _narrow(run_in, tokens, wide, rank)
        yield _narrow(run_in, tokens, rank, narrow, adds=True)
        return
    yield _narrow(run_in, tokens, narrow, rank)  # the gradient of A x
    yield _narrow(run_in, tokens, wide, rank)  # A x again
    yield _narrow(run_in, wide, tokens, rank)  # the gradient of A
    yield _narrow(run_in, rank, tokens, narrow)  # the gradient of B
    yield _narrow(run_in, tokens, rank, wide, adds=True)  # added to the gradient of x


def _narrow(run_in: Pass, m: int, k: int, n: int, *, adds: bool = False) -> Operation:
    """Return a product of the adapter, `(m, k)` by `(k, n)`; `adds`: to what is there."""
    num_bytes = (m * k + k * n + m * n * (2 if adds else 1)) * BYTES
    return Operation(run_in, OperationKind.LORA_GEMM, "product", 2 * m * k * n, num_bytes, 1)


def _layer(shape: StepShape, run_in: Pass) -> Iterator[Operation]:
    """Yield what a layer computes besides its linear layers: each activation is read or written once a kernel."""
    tokens, is_backward = shape.num_tokens, run_in == Pass.BACKWARD
    query, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def element_wise(kind: OperationKind, num_values: int) -> Operation:
        return Operation(run_in, kind, "one kernel", 0, tokens * num_values * BYTES, 1)

    for _ in range(2):
        yield element_wise(OperationKind.NORM, (3 if is_backward else 2) * shape.hidden_size)
        yield element_wise(OperationKind.RESIDUAL, 3 * shape.hidden_size)
    yield element_wise(OperationKind.ROPE, 2 * (query + keys))
    # Backward it writes the activation again, for the gradients of the down projection.
    yield element_wise(OperationKind.MLP, (6 if is_backward else 3) * shape.intermediate_size)
    flops = 4 * CAUSAL_SHARE * tokens * shape.length * query
    num_bytes = tokens * 2 * (query + keys) * BYTES
    if is_backward:
        yield Operation(run_in, OperationKind.ATTENTION, "flash", int(flops * BACKWARD_PRODUCTS), 2 * num_bytes, 4)
    else:
        yield Operation(run_in, OperationKind.ATTENTION, "flash", int(flops), num_bytes, 1)


def _loss(shape: StepShape) -> Iterator[Operation]:
    """Yield the head forward and backward, and one kernel that turns logits into their gradient, all in 16 bit."""
    tokens, head = shape.num_tokens, shape.vocab_size * shape.hidden_size
    logits = tokens * shape.vocab_size
    num_bytes = (tokens * shape.hidden_size + head + logits) * BYTES
    for run_in in (Pass.FORWARD, Pass.BACKWARD):
        yield Operation(run_in, OperationKind.LOSS, "head", 2 * tokens * head, num_bytes, 1)
    yield Operation(Pass.FORWARD, OperationKind.LOSS, "cross-entropy", 0, 3 * logits * BYTES, 1)
    for run_in, factor in ((Pass.FORWARD, 2), (Pass.BACKWARD, 3)):  # the last norm
        yield Operation(run_in, OperationKind.NORM, "one kernel", 0, factor * tokens * shape.hidden_size * BYTES, 1)
