"""Extend the trace of a few layers to all layers of a model, exactly: event by event.

Layers of one kind between the same neighbours do the same. So each layer of the model repeats the events of its
representative among the traced layers, on storages of its own. If allocations and releases then do not match, the
trace can't be extended.
"""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import count

from qlora_cli.memory.tracing.layers import LayerStack, contexts, represented_by
from qlora_cli.memory.tracing.passes import Passes
from qlora_cli.memory.tracing.trace import MemoryTrace, Segment

# The pass and the layer in which a storage was allocated, and its index among the allocations there.
Origin = tuple[str, int, int]


class UnevenError(Exception):
    """A layer releases other storages than its representative allocated: the model has to be traced as a whole."""


def passes_of(trace: MemoryTrace) -> Passes:
    """Return the recorded events, unextended."""
    passes = Passes(storages=list(trace.storages))
    for segment in trace.segments:
        passes.events.setdefault(str(segment.mark[0]), []).extend(segment.events)
    passes.find_permanent()
    return passes


def extend(trace: MemoryTrace, stack: LayerStack, chosen: Sequence[int]) -> Passes:
    """Return the events that were recorded for the layers `chosen`, extended to the whole `stack`.

    Raises:
        UnevenError: it can't be extended.
    """
    return _Extension(trace, stack, chosen).run()


class _Extension:
    """The extension of one trace.

    A *layer* is any layer of the model, by its index. A *part* is a traced layer, by its index among the traced ones.

    Attributes:
        part_of: The part that represents each layer.
        layers_of: The layers in the same context as each part.
        origins: Where each storage of the trace was allocated, if in a layer.
        numbers: The number of each storage in `passes`, by its origin in its layer or, outside of the layers, by its
            number in the trace.
        live: The storages of `passes` that are allocated.
    """

    def __init__(self, trace: MemoryTrace, stack: LayerStack, chosen: Sequence[int]) -> None:
        self.kinds = [stack.kinds[index] for index in chosen]
        self.part_of = represented_by(stack, chosen)
        traced = contexts(self.kinds)
        self.layers_of = {
            part: [layer for layer, other in enumerate(self.part_of) if traced[other] == traced[part]]
            for part in range(len(chosen))
        }
        self.trace = trace
        self.permanent = passes_of(trace).permanent
        self.passes = Passes()
        self.origins: dict[int, Origin] = {}
        self.numbers: dict[Origin | int, int] = {}
        self.live: set[int] = set()

    def run(self) -> Passes:
        for name, segments in _by_pass(self.trace.segments):
            layers = [segment for segment in segments if isinstance(segment.mark[1], int)]
            if layers:
                self._extend_pass(name, segments, layers)
                continue
            for segment in segments:
                self._copy(name, segment)
        self.passes.find_permanent()
        return self.passes

    def _extend_pass(self, name: str, segments: list[Segment], layers: list[Segment]) -> None:
        """Extend a pass through the layers: ascending in the forward pass, descending in the backward pass."""
        order = [segment.mark[1] for segment in layers]
        ascending = list(range(len(self.layers_of)))
        if order not in (ascending, ascending[::-1]):
            raise UnevenError(f"{name} went through layers in the order {order}")
        by_part = {segment.mark[1]: segment for segment in layers}
        before = segments[: segments.index(layers[0])]
        after = segments[segments.index(layers[-1]) + 1 :]
        self._record_origins(name, by_part)
        for segment in before:
            self._copy(name, segment)
        all_layers = range(len(self.part_of))
        in_order = list(all_layers if order == ascending else reversed(all_layers))
        last_of = {self.part_of[layer]: layer for layer in in_order}
        for layer in in_order:
            part = self.part_of[layer]
            self._repeat(name, layer, by_part[part], is_last=last_of[part] == layer)
        for segment in after:
            self._copy(name, segment)

    def _record_origins(self, name: str, by_part: Mapping[int, Segment]) -> None:
        """Give each allocation an index within its part, equal in parts of one kind."""
        allocated: dict[int, list[int]] = {
            part: [event for event in segment.events if event >= 0 and event not in self.permanent]
            for part, segment in by_part.items()
        }
        numberings: dict[int, _Numbering] = {}
        for part in sorted(allocated, key=lambda part: len(allocated[part])):
            sizes = [self.trace.storages[number].num_bytes for number in allocated[part]]
            numbering = numberings.setdefault(self.kinds[part], _Numbering())
            for number, index in zip(allocated[part], numbering.number(sizes), strict=True):
                self.origins[number] = (name, part, index)
            # Storages that are never released, such as the workspace of the first product, have no counterparts.
            permanent = (event for event in by_part[part].events if event >= 0 and event in self.permanent)
            for extra, number in enumerate(permanent):
                self.origins[number] = (name, part, -1 - extra)

    def _repeat(self, name: str, layer: int, segment: Segment, *, is_last: bool) -> None:
        """Repeat the events of a part for one of its layers; `is_last`: the last of these in this pass."""
        part = segment.mark[1]
        for event in segment.events:
            if event >= 0:
                _, _, index = self.origins[event]
                self._allocate(name, (name, layer, index), event)
                continue
            origin = self.origins.get(~event)
            if origin is None:
                if is_last:  # allocated outside of the layers, and needed by all layers of this part
                    self._free(name, ~event)
            else:
                allocated_in, allocating_part, index = origin
                if abs(allocating_part - part) > 1:
                    raise UnevenError(f"{name}: layer {part} releases what layer {allocating_part} allocated")
                self._free(name, (allocated_in, layer + allocating_part - part, index))

    def _copy(self, name: str, segment: Segment) -> None:
        """Copy the events outside of the layers; releasing a storage of a part releases it for each of its layers."""
        for event in segment.events:
            if event >= 0:
                self._allocate(name, event, event)
                continue
            origin = self.origins.get(~event)
            if origin is None:
                self._free(name, ~event)
            else:
                allocated_in, part, index = origin
                live = [key for layer in self.layers_of[part] if self._is_live(key := (allocated_in, layer, index))]
                if not live and part in self.part_of:  # otherwise released with those of its representative
                    raise UnevenError(f"{name}: nothing is left of what layer {part} allocated in {allocated_in}")
                for key in live:
                    self._free(name, key)

    def _allocate(self, name: str, key: Origin | int, original: int) -> None:
        number = len(self.passes.storages)
        self.passes.storages.append(self.trace.storages[original])
        self.numbers[key] = number
        self.live.add(number)
        self.passes.events.setdefault(name, []).append(number)

    def _is_live(self, key: Origin) -> bool:
        return self.numbers.get(key, -1) in self.live

    def _free(self, name: str, key: Origin | int) -> None:
        number = self.numbers.get(key)
        if number is None or number not in self.live:
            raise UnevenError(f"{name}: {key} is released, but not allocated")
        self.live.discard(number)
        self.passes.events.setdefault(name, []).append(~number)


class _Numbering:
    """Numbers for the allocations of the parts of one kind, equal where they are the same allocation.

    Parts of a kind may differ by a few: the last layer gathers its own shards as well as those of the layer before it,
    and the first those of the embedding. So each part is aligned with all that earlier ones allocated.

    Attributes:
        merged: The size and the number of each allocation of any part, in an order that all parts follow.
        known: The numbers of a part with so many allocations.
        unused: The numbers that no allocation has yet.
    """

    def __init__(self) -> None:
        self.merged: list[tuple[int, int]] = []
        self.known: dict[int, list[int]] = {}
        self.unused = count()

    def number(self, sizes: Sequence[int]) -> list[int]:
        """Return the number of each allocation of a part, whose sizes are given."""
        if len(sizes) not in self.known:
            self.known[len(sizes)] = self._align(sizes)
        return self.known[len(sizes)]

    def _align(self, sizes: Sequence[int]) -> list[int]:
        numbers: list[int] = []
        merged: list[tuple[int, int]] = []
        matcher = SequenceMatcher(None, [size for size, _ in self.merged], sizes, autojunk=False)
        for tag, start, end, first, last in matcher.get_opcodes():
            merged += self.merged[start:end]
            if tag == "equal":
                numbers += [number for _, number in self.merged[start:end]]
                continue
            added = [next(self.unused) for _ in range(first, last)]
            numbers += added
            merged += zip(sizes[first:last], added, strict=True)
        self.merged = merged
        return numbers


def _by_pass(segments: Sequence[Segment]) -> list[tuple[str, list[Segment]]]:
    """Group consecutive segments of one pass, with the name of the pass."""
    groups: list[tuple[str, list[Segment]]] = []
    for segment in segments:
        name = str(segment.mark[0])
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].append(segment)
    return groups
