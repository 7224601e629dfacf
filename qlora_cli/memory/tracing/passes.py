"""Allocations and releases of storages, in named passes, whether recorded by a trace or known without one."""

from dataclasses import dataclass, field

MISMATCHED = ", mismatched"  # ends the name of the passes of KTO's baseline, before the first micro-batch of a step
REFERENCE = ", reference"  # ends the name of the pass through the base alone that a forward pass of pairs begins with


@dataclass(slots=True)
class TracedStorage:
    """One piece of memory: its size in bytes, and its purpose."""

    num_bytes: int
    label: str


@dataclass(slots=True)
class Passes:
    """Events of passes, by name: `n` is the allocation of storage `n`, `~n` its release.

    `permanent` are the storages that are never released.
    """

    storages: list[TracedStorage] = field(default_factory=list)
    events: dict[str, list[int]] = field(default_factory=dict)
    permanent: set[int] = field(default_factory=set)

    def find_permanent(self) -> None:
        """Determine which storages are never released; to be called once all events are recorded."""
        released = {~event for events in self.events.values() for event in events if event < 0}
        allocated = {event for events in self.events.values() for event in events if event >= 0}
        self.permanent = allocated - released


class Recorder:
    """Records the events of one pass."""

    def __init__(self, passes: Passes, name: str, label: str) -> None:
        self._passes = passes
        self._events = passes.events.setdefault(name, [])
        self._label = label

    def allocate(self, num_bytes: int, label: str | None = None) -> int:
        """Record the allocation of a storage; return its number. An empty one has a number, but no event."""
        number = len(self._passes.storages)
        self._passes.storages.append(TracedStorage(num_bytes, label or self._label))
        if num_bytes:
            self._events.append(number)
        return number

    def free(self, *numbers: int) -> None:
        """Record the release of storages, in this order."""
        self._events += [~number for number in numbers if self._passes.storages[number].num_bytes]
