"""Extend what was recorded for few layers to all of a model's, exactly: event by event.

A layer between the same neighbours does the same. So each layer of the model takes over the events of its likeness
among the layers that were traced, on storages of its own. Where that does not come out even, there is no extension.
"""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from qlora_cli.memory.tracing.layers import LayerStack, contexts
from qlora_cli.memory.tracing.passes import Passes
from qlora_cli.memory.tracing.trace import MemoryTrace, Segment

Key = tuple[str, int, int]  # the pass and the layer that a storage was born in, and its place among those born there


class UnevenError(Exception):
    """What a layer gives back is not what its likeness took: the model has to be traced as a whole."""


def passes_of(trace: MemoryTrace) -> Passes:
    """Return what was recorded as it is."""
    passes = Passes(storages=list(trace.storages))
    for segment in trace.segments:
        passes.events.setdefault(str(segment.mark[0]), []).extend(segment.events)
    passes.find_permanent()
    return passes


def extend(trace: MemoryTrace, stack: LayerStack, chosen: Sequence[int]) -> Passes:
    """Return what was recorded for the layers `chosen`, as it is for the whole `stack`.

    Raises:
        UnevenError: it can't be extended.
    """
    return _Extension(trace, stack, chosen).run()


class _Extension:
    def __init__(self, trace: MemoryTrace, stack: LayerStack, chosen: Sequence[int]) -> None:
        traced = contexts([stack.kinds[index] for index in chosen])
        places = {context: place for place, context in reversed(list(enumerate(traced)))}
        self.likeness = [places[context] for context in contexts(stack.kinds)]
        self.followers = {
            place: [layer for layer, likeness in enumerate(self.likeness) if likeness == places[context]]
            for place, context in enumerate(traced)
        }
        self.trace = trace
        self.kinds = [stack.kinds[index] for index in chosen]
        self.stays = passes_of(trace).permanent
        self.passes = Passes()
        self.birthplaces: dict[int, Key] = {}
        self.numbers: dict[Key | int, int] = {}
        self.live: set[int] = set()

    def run(self) -> Passes:
        for name, segments in _by_pass(self.trace.segments):
            layers = [segment for segment in segments if isinstance(segment.mark[1], int)]
            if not layers:
                for segment in segments:
                    self._outside(name, segment)
                continue
            self._pass(name, segments, layers)
        self.passes.find_permanent()
        return self.passes

    def _pass(self, name: str, segments: list[Segment], layers: list[Segment]) -> None:
        parts = [segment.mark[1] for segment in layers]
        order = range(len(self.likeness))
        ascending = list(range(len(self.followers)))
        if parts not in (ascending, ascending[::-1]):
            raise UnevenError(f"{name} went through layers in the order {parts}")
        by_part = {segment.mark[1]: segment for segment in layers}
        before = segments[: segments.index(layers[0])]
        after = segments[segments.index(layers[-1]) + 1 :]
        self._register(name, by_part)
        for segment in before:
            self._outside(name, segment)
        in_order = list(order if parts == ascending else reversed(order))
        last_of = {self.likeness[layer]: layer for layer in in_order}
        for layer in in_order:
            part = self.likeness[layer]
            self._layer(name, layer, by_part[part], is_last=last_of[part] == layer)
        for segment in after:
            self._outside(name, segment)

    def _register(self, name: str, by_part: Mapping[int, Segment]) -> None:
        """Give each birth its place among those of its layer: the same place in layers of one kind."""
        births: dict[int, list[int]] = {
            part: [event for event in segment.events if event >= 0 and event not in self.stays]
            for part, segment in by_part.items()
        }
        models: dict[int, list[int]] = {}
        for part in sorted(births, key=lambda part: len(births[part])):
            sizes = [self.trace.storages[number].num_bytes for number in births[part]]
            model = models.setdefault(self.kinds[part], sizes)
            for number, place in zip(births[part], _places(model, sizes), strict=True):
                self.birthplaces[number] = (name, part, place)
            # What stays for good, as the workspace of the first product, has no place among equals.
            for extra, number in enumerate(e for e in by_part[part].events if e >= 0 and e in self.stays):
                self.birthplaces[number] = (name, part, -1 - extra)

    def _layer(self, name: str, layer: int, segment: Segment, *, is_last: bool) -> None:
        part = segment.mark[1]
        for event in segment.events:
            if event >= 0:
                _, _, place = self.birthplaces[event]
                self._born(name, (name, layer, place), event)
                continue
            birthplace = self.birthplaces.get(~event)
            if birthplace is None:
                if is_last:  # the last that looks like this one is the last to need it
                    self._died(name, ~event)
            else:
                where, other, place = birthplace
                if abs(other - part) > 1:
                    raise UnevenError(f"{name}: layer {part} gives back what layer {other} took")
                self._died(name, (where, layer + other - part, place))

    def _outside(self, name: str, segment: Segment) -> None:
        for event in segment.events:
            if event >= 0:
                self._born(name, event, event)
                continue
            birthplace = self.birthplaces.get(~event)
            if birthplace is None:
                self._died(name, ~event)
            else:
                where, part, place = birthplace
                held = [key for layer in self.followers[part] if self._is_held(key := (where, layer, place))]
                if not held and part in self.likeness:  # else it went with those of its double
                    raise UnevenError(f"{name}: nothing is held of what layer {part} took in {where}")
                for key in held:
                    self._died(name, key)

    def _born(self, name: str, key: Key | int, original: int) -> None:
        number = len(self.passes.storages)
        self.passes.storages.append(self.trace.storages[original])
        self.numbers[key] = number
        self.live.add(number)
        self.passes.events.setdefault(name, []).append(number)

    def _is_held(self, key: Key) -> bool:
        return self.numbers.get(key, -1) in self.live

    def _died(self, name: str, key: Key | int) -> None:
        number = self.numbers.get(key)
        if number is None or number not in self.live:
            raise UnevenError(f"{name}: {key} is given back, but not held")
        self.live.discard(number)
        self.passes.events.setdefault(name, []).append(~number)


def _places(model: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the place in `model` of each of `sizes`, which may be more; what has none gets one beyond its end."""
    if len(model) == len(sizes):
        return list(range(len(sizes)))
    places = [len(model) + place for place in range(len(sizes))]
    for block in SequenceMatcher(None, model, sizes, autojunk=False).get_matching_blocks():
        for step in range(block.size):
            places[block.b + step] = block.a + step
    return places


def _by_pass(segments: Sequence[Segment]) -> list[tuple[str, list[Segment]]]:
    found: list[tuple[str, list[Segment]]] = []
    for segment in segments:
        name = str(segment.mark[0])
        if not found or found[-1][0] != name:
            found.append((name, []))
        found[-1][1].append(segment)
    return found
