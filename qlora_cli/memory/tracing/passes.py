"""Births and deaths of storages, in named passes: what a trace comes to, and what is known without one."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class TracedStorage:
    """One piece of memory: its bytes, and what it is for."""

    num_bytes: int
    label: str


@dataclass(slots=True)
class Passes:
    """Events of passes, by name: `n` is the birth of storage `n`, `~n` its death.

    `permanent` are the storages that are never given back.
    """

    storages: list[TracedStorage] = field(default_factory=list)
    events: dict[str, list[int]] = field(default_factory=dict)
    permanent: set[int] = field(default_factory=set)

    def find_permanent(self) -> None:
        """Note what is never given back, once all is recorded."""
        dead = {~event for events in self.events.values() for event in events if event < 0}
        born = {event for events in self.events.values() for event in events if event >= 0}
        self.permanent = born - dead


class Recorder:
    """Writes down the events of one pass."""

    def __init__(self, passes: Passes, name: str, label: str) -> None:
        self._passes = passes
        self._events = passes.events.setdefault(name, [])
        self._label = label

    def born(self, num_bytes: int, label: str | None = None) -> int:
        """Record the birth of a storage; return its number."""
        number = len(self._passes.storages)
        self._passes.storages.append(TracedStorage(num_bytes, label or self._label))
        if num_bytes:
            self._events.append(number)
        return number

    def died(self, *numbers: int) -> None:
        """Record deaths, in order."""
        self._events += [~number for number in numbers if self._passes.storages[number].num_bytes]
