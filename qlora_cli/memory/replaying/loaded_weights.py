"""The allocations of loading: the weights, one after another, and the adapter.

Loading is replayed weight by weight, because the 16-bit copy of a weight that is quantized leaves a free block in the
allocator's pool. Later tensors go into such blocks, so they decide how much the pool reserves.
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from qlora_cli.memory.tracing.layers import LayerStack, represented_by
from qlora_cli.memory.tracing.passes import Passes, Recorder
from qlora_cli.memory.tracing.shards import ShardedBase
from qlora_cli.quantization.entries import WeightEntry
from qlora_cli.quantization.methods.method import WeightPart
from qlora_cli.quantization.storage_plan import StoragePlan

QUANTIZED, CONSTANTS, UNQUANTIZED, ADAPTERS = (
    "quantized_weights",
    "quantization_constants",
    "unquantized_weights",
    "adapters",
)
LABELS = {WeightPart.WEIGHT: UNQUANTIZED, WeightPart.CODES: QUANTIZED, WeightPart.CONSTANTS: CONSTANTS}
LOAD, ADAPT = "load", "adapt"


def load_weights(
    layout: StoragePlan,
    *,
    num_experts: int = 1,
    on_host: Iterable[str] = (),
    sharded: ShardedBase | None = None,
) -> Passes:
    """Return the allocations and releases of loading, as pass `load`.

    `num_experts` are stacked in a fused weight; `on_host` names the weights that stay in host memory. Of those that
    are `sharded`, only the shard stays, if not on the host; those outside of the layers are loaded after them.
    """
    passes = Passes()
    load = Recorder(passes, LOAD, UNQUANTIZED)
    skipped = set(on_host)
    entries = [entry for entry in layout.inventory.entries if entry.name not in skipped]
    if sharded is not None:
        _load_shards(load, sorted(entries, key=_natural_key), layout, num_experts, sharded)
    else:
        for entry in warm_up(load, entries):
            load_weight(load, entry, layout, num_experts)
    load.allocate(layout.inventory.buffer_bytes)
    return passes


def warm_up(load: Recorder, entries: Sequence[WeightEntry]) -> list[WeightEntry]:
    """Record the block of the model's size that transformers allocates first; return the weights in loading order.

    Because of that block (`caching_allocator_warmup`), memory is requested from the driver only once.
    """
    load.free(load.allocate(sum(entry.weight_bytes for entry in entries)))
    return sorted(entries, key=_natural_key)


def _load_shards(
    load: Recorder,
    entries: Sequence[WeightEntry],
    layout: StoragePlan,
    num_experts: int,
    sharded: ShardedBase,
) -> None:
    """Record the loading of weights of which shards are kept, each as soon as it is whole."""
    shards = sharded.shards
    is_of_layer = {entry.name: entry.name in shards and not shards[entry.name].is_of_end for entry in entries}
    for entry in sorted(entries, key=lambda entry: not is_of_layer[entry.name]):
        whole = load_weight(load, entry, layout, num_experts)
        if shard := shards.get(entry.name):
            for _ in range(0 if sharded.is_on_host else shard.num_units):
                load.allocate(shard.num_bytes, QUANTIZED if entry.is_quantized else UNQUANTIZED)
            load.free(*whole)


def load_weight(load: Recorder, entry: WeightEntry, layout: StoragePlan, num_experts: int = 1) -> list[int]:
    """Record the loading of one weight; return the numbers of its storages, without those of constants."""
    if not entry.is_quantized:
        return [load.allocate(entry.weight_bytes)]
    if layout.prequantized is not None:
        codes = load.allocate(entry.weight_bytes, QUANTIZED)
        load.allocate(entry.constant_bytes, CONSTANTS)
        return [codes]
    return _quantize(load, entry, layout, num_experts if entry.kind == "experts" else 1)


def _natural_key(entry: WeightEntry) -> list[tuple[int, int, str]]:
    """Return the key by which transformers sorts names (`dot_natural_key`): numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", entry.name)]


def _quantize(load: Recorder, entry: WeightEntry, layout: StoragePlan, num_pieces: int) -> list[int]:
    """Record the allocations of quantizing a 16-bit weight, and the release of those that do not stay.

    Returns the numbers of the codes.
    """
    temporary, codes = [], []
    for allocation in layout.method.allocations(entry, layout.settings, layout.dtype, num_pieces):
        number = load.allocate(allocation.num_bytes, LABELS[allocation.part])
        if not allocation.is_persistent:
            temporary.append(number)
        elif allocation.part == WeightPart.CODES:
            codes.append(number)
    load.free(*reversed(temporary))
    return codes


def load_adapter(passes: Passes, trained: Sequence[nn.Parameter], copied_bytes: Sequence[int] = ()) -> None:
    """Add the allocations of the adapter as pass `adapt`, parameter by parameter.

    `copied_bytes` are the sizes of untrained base parameters of which the adapter's file has a copy.
    """
    adapt = Recorder(passes, ADAPT, ADAPTERS)
    for num_bytes in copied_bytes:
        adapt.allocate(num_bytes)
    for parameter in trained:
        adapt.allocate(parameter.numel() * parameter.element_size())


def trained_parameters(model: nn.Module, stack: LayerStack | None, chosen: Sequence[int]) -> list[nn.Parameter]:
    """Return the trained parameters of all layers, in the order of the whole model.

    `model` has the layers `chosen`; for any other layer, the parameters of its representative are returned.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stack is None:
        return [parameter for _, parameter in named]
    in_layer = re.compile(rf"(^|\.){re.escape(stack.path)}\.(\d+)\.")
    by_part: dict[int, list[nn.Parameter]] = {part: [] for part in range(len(chosen))}
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    for name, parameter in named:
        if match := in_layer.search(name):
            by_part[int(match[2])].append(parameter)
        else:
            (after if any(by_part.values()) else before).append(parameter)
    in_layers = (parameter for part in represented_by(stack, chosen) for parameter in by_part[part])
    return [*before, *in_layers, *after]
