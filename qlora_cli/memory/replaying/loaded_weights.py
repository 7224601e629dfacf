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
from qlora_cli.settings.choices import Recipe

QUANTIZED, CONSTANTS, UNQUANTIZED, ADAPTERS = (
    "quantized_weights",
    "quantization_constants",
    "unquantized_weights",
    "adapters",
)
LABELS = {WeightPart.WEIGHT: UNQUANTIZED, WeightPart.CODES: QUANTIZED, WeightPart.CONSTANTS: CONSTANTS}
FLOAT_BYTES = 4
LOAD, UPCAST, ADAPT = "load", "upcast", "adapt"


def load_weights(
    layout: StoragePlan,
    recipe: Recipe,
    *,
    num_experts: int = 1,
    on_host: Iterable[str] = (),
) -> Passes:
    """Return what loading takes and leaves: pass `load`, and for PEFT's preparation `upcast`.

    `num_experts` are stacked in a fused weight; `on_host` are names of weights that are kept in host memory.
    """
    passes = Passes()
    load = Recorder(passes, LOAD, UNQUANTIZED)
    skipped = set(on_host)
    entries = [entry for entry in layout.inventory.entries if entry.name not in skipped]
    # transformers takes a block as large as the model first, so that the driver is asked once
    # (`caching_allocator_warmup`); an unquantized model of the plain recipe comes by way of the host.
    is_direct = recipe == Recipe.PEFT and not layout.settings.method.is_quantized
    if not is_direct:
        load.died(load.born(sum(entry.weight_bytes for entry in entries)))
        entries = sorted(entries, key=_natural)
    upcast: list[tuple[WeightEntry, int]] = []
    for entry in entries:
        if not entry.is_quantized:
            number = load.born(entry.weight_bytes)
            upcast.append((entry, number))
        elif layout.prequantized is not None:
            load.born(entry.weight_bytes, QUANTIZED)
            load.born(entry.constant_bytes, CONSTANTS)
        else:
            _quantize(load, entry, layout, num_experts if entry.kind == "experts" else 1)
    load.born(layout.inventory.buffer_bytes)
    if recipe == Recipe.PEFT and layout.settings.method.is_quantized:
        _upcast(Recorder(passes, UPCAST, UNQUANTIZED), layout, upcast)
    return passes


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


def _upcast(recorder: Recorder, layout: StoragePlan, upcast: Sequence[tuple[WeightEntry, int]]) -> None:
    """Cast what is not quantized to fp32, as `prepare_model_for_kbit_training` does in the order of the model."""
    order = {entry.name: place for place, entry in enumerate(layout.inventory.entries)}
    for entry, number in sorted(upcast, key=lambda pair: order[pair[0].name]):
        recorder.born(entry.num_parameters * FLOAT_BYTES)
        recorder.died(number)


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
