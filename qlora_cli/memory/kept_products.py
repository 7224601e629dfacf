"""Which products of the base are worth keeping for the backward pass, by what is recomputed without them."""

from collections import Counter

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.checkpointing import linear_layers_by_name
from qlora_cli.memory.prediction import Product
from qlora_cli.memory.tracing.operations import num_tiles
from qlora_cli.timing.operation import Counted, OperationKind, Pass


def recomputed_products(
    model: PreTrainedModel, micro_batch: Counted, *, num_tokens: int, itemsize: int
) -> list[Product]:
    """Return the products of the linear layers of `model` that a micro-batch of `num_tokens` computes twice.

    `micro_batch` are the operations with whole layers recomputed; results have `itemsize` bytes a number. Layers are
    told apart by the shape of their products: of several names with the same, all count as recomputed if one is.
    """
    times = _gemms(micro_batch)
    products = []
    for name, layers in linear_layers_by_name(model).items():
        if model.get_output_embeddings() in layers:
            continue  # the loss multiplies by it
        sides = [_sides(layer) for layer in layers]
        shapes = [(2 * num_tokens * wide * narrow, num_tiles(num_tokens, narrow)) for wide, narrow in sides]
        if all(times[Pass.RECOMPUTE, shape] for shape in shapes):
            num_bytes = sum(num_tokens * narrow * itemsize for _, narrow in sides)
            products.append(Product(name=name, kept_bytes=num_bytes, flops=sum(flops for flops, _ in shapes)))
    return products


def _gemms(micro_batch: Counted) -> Counter[tuple[Pass, tuple[int, int]]]:
    """Return how often the base multiplies, by pass, number of operations and number of tiles of the result."""
    times: Counter[tuple[Pass, tuple[int, int]]] = Counter()
    for number, operation in micro_batch:
        if operation.kind == OperationKind.BASE_GEMM:
            times[operation.run_in, (operation.flops, operation.tiles)] += number
    return times


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    assert isinstance(layer, nn.Linear), "a model without adapters"
    return layer.in_features, layer.out_features
