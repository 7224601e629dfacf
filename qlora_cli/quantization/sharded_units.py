"""The units of a sharded base: modules whose weights are gathered together, from all processes, while they compute."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.errors import ModelError


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model, each of which is a unit.

    Raises:
        ModelError: it has none that could be gathered one by one.
    """
    layers: list[nn.Module] = [layer for layer in base.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} has no decoder layers that could be gathered one by one",
            hint="Use --strategy ddp.",
            setting="training.strategy",
        )
    return layers


def ends_of(base: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the embedding and the head, each a unit; None for one with an adapter or rows that are trained."""
    embedding, head = (
        module if isinstance(module, nn.Embedding | nn.Linear) else None
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    return embedding, head
