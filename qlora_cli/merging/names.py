"""What PEFT and adapters call the weights of a base, by their names in the base."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from qlora_cli.adapters.targets import BASE
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import TensorHeader, read_header


def in_base(path: str) -> str:
    """Return what a module or parameter of the adapted model is called in the base."""
    return path.removeprefix(BASE).replace(".token_adapter", "").replace(".base_layer", "")


def ends_of(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights of embedding and head, and of the head's bias."""
    modules = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in modules
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def rows_of_adapter(model: PreTrainedModel, directory: Path) -> int:
    """Return how many rows the adapter in `directory` has for embedding and head as a whole; 0 if it has no such.

    Other tools give a vocabulary more rows than their tokenizer has ids, up to a multiple of 32 or 64.
    """
    if not (directory / ADAPTER_WEIGHTS).is_file():
        return 0
    return max((header.shape[0] for header in _of(ends_of(model), read_header(directory, ADAPTER_WEIGHTS))), default=0)


def _of(names: set[str], headers: Iterable[TensorHeader]) -> Iterable[TensorHeader]:
    return (header for header in headers if in_base(header.name) in names and header.shape)


def with_twins(names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Return for each of `names`, and for those that are one with them, the one that is named."""
    found = {name: name for name in names}
    for one, other in tied.items():
        for name, twin in ((one, other), (other, one)):
            if twin in found:
                found.setdefault(name, twin)
    return found
