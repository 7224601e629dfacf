"""Count a loaded model's parameters and bytes by kind, exactly, from its tensors."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.quantization.entries import Inventory, WeightEntry, dtype_name
from qlora_cli.quantization.methods import stored_weight
from qlora_cli.quantization.methods.skip_modules import HEAD, ROUTER_NAME, holds_experts


def take_inventory(model: nn.Module, unquantized: Mapping[str, str]) -> Inventory:
    """Return the inventory of a loaded model; `unquantized` maps linear layers to why they are not quantized."""
    tables: set[int] = set()  # code tables may be shared between weights
    entries = []
    for name, module, parameter in unique_parameters(model):
        stored = stored_weight(module, name.rpartition(".")[2], parameter)
        constants = sum(tensor.nbytes for tensor in stored.constants if tensor.data_ptr() not in tables)
        tables |= {tensor.data_ptr() for tensor in stored.constants}
        kind, why_not = classify(name, module, len(stored.shape), unquantized)
        entries.append(
            WeightEntry(
                name=name,
                kind=kind,
                why_not=stored.why_not and (why_not or stored.why_not),
                num_parameters=prod(stored.shape),
                weight_bytes=parameter.nbytes,
                constant_bytes=constants,
                dtype=dtype_name(parameter.dtype),
            )
        )
    return Inventory(entries=tuple(entries), buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()))


def classify(name: str, module: nn.Module, num_dims: int, unquantized: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the kind of a weight, and why it can't be quantized; None if it can."""
    owner = name.rpartition(".")[0]
    if isinstance(module, nn.Embedding):
        return "embedding", "looked up, not multiplied"
    if num_dims < 2 or name.endswith("bias"):
        return "norms, biases, vectors", "small"
    if reason := unquantized.get(owner):
        return ("output head" if reason == HEAD else "linear layers"), reason
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "convolutions", "no matrix product"
    if ROUTER_NAME.search(owner):
        return "routers", "router"
    if holds_experts(name, module, num_dims):
        return "experts", unquantized.get(name)
    if isinstance(module, nn.Linear | Conv1D):
        return "linear layers", None
    return "other weights", "no linear layer"


def unique_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield each parameter once, with its module; a parametrized one under the name of its attribute."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        parameters: Iterable[tuple[str, nn.Parameter]] = module.named_parameters(recurse=False)
        chains = getattr(module, "parametrizations", {})
        parameters = [*parameters, *((name, chain.original) for name, chain in chains.items())]
        for name, parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), module, parameter
