"""The embedding and the output head: find them, offload the embedding to host memory, extend both for new tokens."""

from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.errors import HardwareError, ModelError


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head shares the embedding's weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is embedding_of(model).weight


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """Return the token embedding, `(vocabulary, hidden)`."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), f"{type(model).__name__} embeds tokens by {type(embedding).__name__}"
    return embedding


def vocabulary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embedding and the head by name."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if id(module) in ends}


def vocabulary_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights of the embedding and the head, and of the head's bias."""
    return {
        f"{name}.{leaf}"
        for name, module in vocabulary_modules(model).items()
        for leaf, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def offload_device_map(model: PreTrainedModel, device: torch.device) -> dict[str, torch.device | str]:
    """Return the device map that puts the embedding of `model` on the host and everything else on `device`.

    No entry contains the embedding: accelerate would first move all that is below such an entry.
    """
    embedding = embedding_of(model)
    ancestors = {
        name: module for name, module in model.named_modules() if any(below is embedding for below in module.modules())
    }
    device_map: dict[str, torch.device | str] = {}
    for path, module in ancestors.items():
        if module is embedding:
            device_map[path] = "cpu"
            continue
        prefix = f"{path}." if path else ""
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        inside = [name for name, _ in (*module.named_children(), *own)]
        device_map |= {f"{prefix}{name}": device for name in inside if f"{prefix}{name}" not in ancestors}
    return device_map


def undo_dispatch(model: PreTrainedModel) -> None:
    """Remove accelerate's hooks from a model on two devices: they would copy the embedding to the GPU at every step.

    accelerate holds the weight on the host, and leaves a placeholder in the module; put the weight back.
    """
    embedding = embedding_of(model)
    weight: torch.Tensor = embedding._hf_hook.weights_map["weight"]  # type: ignore[union-attr, index]
    remove_hook_from_module(model, recurse=True)
    embedding.weight = nn.Parameter(weight, requires_grad=False)


def check_offload(model: PreTrainedModel, device: torch.device) -> None:
    """Check that the embedding of `model` can stay in host memory while the rest is on `device`.

    Raises:
        HardwareError: there is no GPU to save memory on.
        ModelError: the head shares the embedding's weight, which a GPU multiplies with.
    """
    if device.type != "cuda":
        raise HardwareError(
            f"has no effect: the model is on {device}, in host memory already",
            hint="Leave it out.",
            setting="model.offload_embedding",
        )
    if is_tied(model):
        raise ModelError(
            "can't be used: the output head shares the weight, and needs it on the GPU",
            hint="Leave it out.",
            setting="model.offload_embedding",
        )


def keep_on_host(embedding: nn.Embedding, device: torch.device) -> None:
    """Make `embedding` look up tokens on the host, where its weight is, and copy the vectors to `device`."""

    def to_weight(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *rest = inputs
        return (ids.to(embedding.weight.device), *rest)

    def to_device(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.to(device, non_blocking=True)

    embedding.register_forward_pre_hook(to_weight)
    embedding.register_forward_hook(to_device)


def extend_vocabulary(model: PreTrainedModel, num_rows: int) -> None:
    """Extend the embedding and the head to `num_rows` rows; a tied head stays tied.

    New rows are the mean of the old ones, so that they neither dominate nor vanish. They are the same every time,
    since an adapter that does not train them does not store them.
    """
    num_before = embedding_of(model).num_embeddings
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    for module in {embedding_of(model), model.get_output_embeddings()} - {None}:
        for values in (module.weight, getattr(module, "bias", None)):
            if values is not None:
                values.data[num_before:] = values.data[:num_before].mean(0, dtype=torch.float32)
    assert embedding_of(model).num_embeddings == num_rows
    model.requires_grad_(False)
