"""Count the operations of a traced micro-batch, equal ones together, and extend the count to all layers of a model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from qlora_cli.memory.tracing.layers import LayerStack, represented_by
from qlora_cli.memory.tracing.operations import operations_of
from qlora_cli.memory.tracing.owners import Owners
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.timing.operation import Counted, Operation, Pass

# Operations by their part, which is the index of a traced layer, or a mark outside of the layers.
OfParts = Counter[tuple[int | str, Operation]]


class OperationCount:
    """The operations of one micro-batch.

    Attributes:
        of_parts: How often each runs.
    """

    def __init__(self, trace: MemoryTrace, num_tokens: int) -> None:
        """Count what `trace` sees; `num_tokens` are those of a micro-batch."""
        self.of_parts: OfParts = Counter()
        self._trace = trace
        self._owners = Owners(trace)
        self._num_tokens = num_tokens

    def watch(self, model: nn.Module, base: Any) -> list[Any]:
        """Register the hooks that tell what an operation belongs to, and return them."""
        return self._owners.watch(model, base)

    def start(self) -> None:
        """Count from here on."""
        self._trace.observer = self._count

    def stop(self) -> None:
        """Count no more."""
        self._trace.observer = None

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        owners, trace = self._owners, self._trace
        if owners.is_recomputing:
            run_in = Pass.RECOMPUTE
        else:
            run_in = Pass.BACKWARD if trace.in_autograd_thread else Pass.FORWARD
        part = trace.segments[-1].mark[1]
        for operation in operations_of(func, args, kwargs, result, owners.current, run_in, self._num_tokens):
            self.of_parts[part, operation] += 1


def extended(of_parts: OfParts, stack: LayerStack | None, chosen: Sequence[int]) -> Counted:
    """Return the operations of the whole `stack`, whose layers `chosen` were traced; None: of all that was traced."""
    represented = [] if stack is None else represented_by(stack, chosen)
    times: Counter[Operation] = Counter()
    for (part, operation), number in of_parts.items():
        times[operation] += number * (represented.count(part) if stack is not None and isinstance(part, int) else 1)
    return tuple((number, operation) for operation, number in times.items() if number)
