"""What stays on the device in a run: the weights, as loading leaves them and the allocator's pool; and the adapter.

Loading is replayed weight by weight: a 16-bit weight that is quantized leaves a hole that later tensors fall into, and
so decides what the pool reserves.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from qlora_cli.memory.tracing.layers import LayerStack, contexts
from qlora_cli.memory.tracing.passes import Passes, Recorder
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


def load_weights(layout: StoragePlan, *, num_experts: int = 1, on_host: Iterable[str] = ()) -> Passes:
    """Return what loading takes and leaves, as pass `load`.

    `num_experts` are stacked in a fused weight; `on_host` are names of weights that stay in host memory.
    """
    passes = Passes()
    load = Recorder(passes, LOAD, UNQUANTIZED)
    skipped = set(on_host)
    for entry in warm_up(load, [entry for entry in layout.inventory.entries if entry.name not in skipped]):
        load_weight(load, entry, layout, num_experts)
    load.born(layout.inventory.buffer_bytes)
    return passes


def warm_up(load: Recorder, entries: Sequence[WeightEntry]) -> list[WeightEntry]:
    """Record the block as large as the model that transformers takes first; return the weights as it reads them.

    With `caching_allocator_warmup` the driver is asked once.
    """
    load.died(load.born(sum(entry.weight_bytes for entry in entries)))
    return sorted(entries, key=_natural)


def load_weight(load: Recorder, entry: WeightEntry, layout: StoragePlan, num_experts: int = 1) -> int | None:
    """Record what one weight takes; return the number of its storage if it is not quantized."""
    if not entry.is_quantized:
        return load.born(entry.weight_bytes)
    if layout.prequantized is not None:
        load.born(entry.weight_bytes, QUANTIZED)
        load.born(entry.constant_bytes, CONSTANTS)
    else:
        _quantize(load, entry, layout, num_experts if entry.kind == "experts" else 1)
    return None


def _natural(entry: WeightEntry) -> list[tuple[int, int, str]]:
    """Order names as `dot_natural_key` of transformers does: numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", entry.name)]


def _quantize(load: Recorder, entry: WeightEntry, layout: StoragePlan, num_pieces: int) -> None:
    """Take what the method takes for a weight in 16 bit, and give back what it does not keep."""
    passing = []
    for allocation in layout.method.allocations(entry, layout.settings, layout.dtype, num_pieces):
        number = load.born(allocation.num_bytes, LABELS[allocation.part])
        if not allocation.is_kept:
            passing.append(number)
    load.died(*reversed(passing))


def attach(passes: Passes, trained: Sequence[nn.Parameter], held_bytes: Sequence[int] = ()) -> None:
    """Add the birth of the adapter, parameter by parameter, and of what it holds besides, as pass `adapt`."""
    adapt = Recorder(passes, ADAPT, ADAPTERS)
    for num_bytes in held_bytes:
        adapt.born(num_bytes)
    for parameter in trained:
        adapt.born(parameter.numel() * parameter.element_size())


def all_trained(model: nn.Module, stack: LayerStack | None, chosen: Sequence[int]) -> list[nn.Parameter]:
    """Return the parameters that train, of all layers, in the order of the model: those of a likeness for each."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stack is None:
        return [parameter for _, parameter in named]
    prefix = re.compile(rf"(^|\.){re.escape(stack.path)}\.(\d+)\.")
    by_layer: dict[int, list[nn.Parameter]] = {place: [] for place in range(len(chosen))}
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    for name, parameter in named:
        if found := prefix.search(name):
            by_layer[int(found[2])].append(parameter)
        else:
            (after if any(by_layer.values()) else before).append(parameter)
    return [*before, *_in_all_layers(by_layer, stack, chosen), *after]


def _in_all_layers(
    by_layer: dict[int, list[nn.Parameter]], stack: LayerStack, chosen: Sequence[int]
) -> Iterator[nn.Parameter]:
    places = {
        context: place
        for place, context in reversed(list(enumerate(contexts([stack.kinds[index] for index in chosen]))))
    }
    for context in contexts(stack.kinds):
        yield from by_layer[places[context]]
