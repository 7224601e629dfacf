"""Count the operations of a traced micro-batch, equal ones together, and extend the count to all layers of a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qlora_cli.memory.tracing.layers import LayerStack, represented_by
from qlora_cli.memory.tracing.meta_results import Asked
from qlora_cli.memory.tracing.operations import operations_of
from qlora_cli.memory.tracing.owners import Owners
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.timing.operation import Counted, Operation, Pass

# Operations by their part, which is the index of a traced layer, or a mark outside of the layers.
OfParts = Counter[tuple[int | str, Operation]]


@dataclass(slots=True)
class _Repeated:
    """Operations that are the same wherever they run, and how often they do, by part."""

    operations: tuple[Operation, ...]
    times: dict[int | str, int] = field(default_factory=dict)


class OperationCount:
    """The operations of one micro-batch."""

    def __init__(self, trace: MemoryTrace, num_tokens: int) -> None:
        """Count what `trace` sees; `num_tokens` are those of a micro-batch."""
        self._trace = trace
        self._owners = Owners(trace)
        self._num_tokens = num_tokens
        # By what they follow from: most of a pass repeats what another layer, or a chunk of the loss, has run.
        self._known: dict[tuple[Any, ...], _Repeated] = {}
        self._distinct: list[_Repeated] = []
        self._in_order: list[tuple[int | str, _Repeated]] = []  # in which they first ran

    @property
    def of_parts(self) -> OfParts:
        """How often each operation runs, by its part."""
        counted: OfParts = Counter()
        for part, repeated in self._in_order:
            for operation in repeated.operations:
                counted[part, operation] += repeated.times[part]
        return counted

    def watch(self, model: nn.Module, base: Any) -> list[Any]:
        """Register the hooks that tell what an operation belongs to, and return them."""
        return self._owners.watch(model, base)

    def start(self) -> None:
        """Count from here on."""
        self._trace.observer = self._count

    def stop(self) -> None:
        """Count no more."""
        self._trace.observer = None

    def taken(self) -> list[dict[int | str, int]]:
        """Return how often each operation ran so far, for `repeat_since`."""
        return [dict(repeated.times) for repeated in self._distinct]

    def repeat_since(self, taken: Sequence[Mapping[int | str, int]], times: int) -> None:
        """Count `times` further what ran since then."""
        for index, repeated in enumerate(self._distinct):
            before = taken[index] if index < len(taken) else {}
            for part, number in repeated.times.items():
                repeated.times[part] = number + times * (number - before.get(part, 0))

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, asked: Asked | None
    ) -> None:
        owners, trace = self._owners, self._trace
        if owners.is_recomputing:
            run_in = Pass.RECOMPUTE
        else:
            run_in = Pass.BACKWARD if trace.in_autograd_thread else Pass.FORWARD
        owner = owners.current
        repeated = None if asked is None else self._known.get((asked, run_in, owner))
        if repeated is None:
            operations = operations_of(func, args, kwargs, result, owner, run_in, self._num_tokens)
            repeated = _Repeated(tuple(operations))
            self._distinct.append(repeated)
            if asked is not None:
                self._known[asked, run_in, owner] = repeated
        part = trace.segments[-1].mark[1]
        if part not in repeated.times:
            self._in_order.append((part, repeated))
        repeated.times[part] = repeated.times.get(part, 0) + 1


def extended(of_parts: OfParts, stack: LayerStack | None, chosen: Sequence[int]) -> Counted:
    """Return the operations of the whole `stack`, whose layers `chosen` were traced; None: of all that was traced."""
    represented = [] if stack is None else represented_by(stack, chosen)
    times: Counter[Operation] = Counter()
    for (part, operation), number in of_parts.items():
        times[operation] += number * (represented.count(part) if stack is not None and isinstance(part, int) else 1)
    return tuple((number, operation) for operation, number in times.items() if number)
