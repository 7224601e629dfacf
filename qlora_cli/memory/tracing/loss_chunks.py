"""Trace only a few chunks of the loss, and repeat their events and operations for the others, exactly.

The loss goes through its tokens in chunks of one size. From the second on, each does what the one before it did:
it allocates the same, and releases what that one left behind. Long rows have a hundred of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_cli.loss.chunked_loss import slices
from qlora_cli.memory.tracing.operation_count import OperationCount
from qlora_cli.memory.tracing.trace import MemoryTrace

NUM_TRACED = 3  # the first, which may differ, and two that are compared


@dataclass(frozen=True, slots=True)
class _Event:
    """An event of a chunk: an allocation by its size and label, or a release by what it releases.

    `index` counts the allocations of the chunk, or of the one before it if that `is_previous`.
    """

    index: int
    allocated: tuple[int, str] | None = None
    is_previous: bool = False


class LossChunks:
    """The chunks of a loss that are run; where they are alike, a few of them."""

    def __init__(self, trace: MemoryTrace, operations: OperationCount) -> None:
        self._trace = trace
        self._operations = operations

    def __call__(self, length: int, size: int) -> Iterator[slice]:
        """Yield slices of at most `size` of `length` tokens, and record what those in between would do."""
        every = list(slices(length, size))
        num_full = length // size
        if num_full <= NUM_TRACED:
            yield from every
            return
        segment = self._trace.segments[-1]
        bounds = [len(segment.events)]
        for chunk in every[:NUM_TRACED]:
            before_last = self._operations.taken()
            yield chunk
            bounds.append(len(segment.events))
        turns = [segment.events[start:end] for start, end in pairwise(bounds)]
        form = self._repeated_form(turns) if self._trace.segments[-1] is segment else None
        if form is None:
            yield from every[NUM_TRACED:]
            return
        num_left_out = num_full - NUM_TRACED
        self._operations.repeat_since(before_last, num_left_out)
        segment.events[bounds[-2] :] = self._repeated(form, turns[-2], turns[-1], num_left_out)
        yield from every[num_full:]

    def _repeated_form(self, turns: Sequence[Sequence[int]]) -> tuple[_Event, ...] | None:
        """Return what the last of three chunks did; None unless any further one would do the same."""
        first, second, third = turns
        form = self._form(third, second)
        before = self._form(second, first)
        if form is None or before is None:
            return None
        # The first chunk may have more allocations than the others, so what is released of it has other indices.
        alike = [each if not each.is_previous else None for each in before]
        if alike != [each if not each.is_previous else None for each in form]:
            return None
        num_allocated = sum(each.allocated is not None for each in form)
        kept = set(range(num_allocated)) - {
            each.index for each in form if each.allocated is None and not each.is_previous
        }
        return form if kept == {each.index for each in form if each.is_previous} else None

    def _form(self, events: Sequence[int], previous: Sequence[int]) -> tuple[_Event, ...] | None:
        """Return the events of a chunk after a `previous` one; None if it releases what neither allocated."""
        own = {number: index for index, number in enumerate(event for event in events if event >= 0)}
        others = {number: index for index, number in enumerate(event for event in previous if event >= 0)}
        form = []
        for event in events:
            if event >= 0:
                storage = self._trace.storages[event]
                form.append(_Event(own[event], (storage.num_bytes, storage.label)))
            elif ~event in own:
                form.append(_Event(own[~event]))
            elif ~event in others:
                form.append(_Event(others[~event], is_previous=True))
            else:
                return None
        return tuple(form)

    def _repeated(self, form: Sequence[_Event], second: Sequence[int], third: Sequence[int], times: int) -> list[int]:
        """Return the events of `times` further chunks after the `second`, and then those of the `third`.

        That one is last, since the storages that it left behind are those that still exist.
        """
        previous = [event for event in second if event >= 0]
        events: list[int] = []
        for _ in range(times):
            own: list[int] = []
            for each in form:
                if each.allocated is not None:
                    own.append(self._trace.add_storage(*each.allocated))
                    events.append(own[-1])
                else:
                    events.append(~(previous if each.is_previous else own)[each.index])
            previous = own
        events += [
            ~previous[each.index] if each.is_previous else event for each, event in zip(form, third, strict=True)
        ]
        return events
