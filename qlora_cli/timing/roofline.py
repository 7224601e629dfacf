"""A roofline: an operation takes as long as its arithmetic or its traffic, whichever is longer. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlora_cli.timing.operation import Operation, OperationKind
from qlora_cli.timing.rates import Rates

COMPUTE, MEMORY, HOST = "compute", "memory", "host"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The seconds of operations.

    Attributes:
        compute_seconds: Of the GPU, in operations that arithmetic limits.
        memory_seconds: Of the GPU, in those that its memory, their launch or copies to the host limit.
        host_seconds: Of one core of the host, to dispatch them all.
        is_host: Whether the host computes, too: on a CPU.
    """

    compute_seconds: float
    memory_seconds: float
    host_seconds: float
    is_host: bool = False

    @property
    def device_seconds(self) -> float:
        """The seconds of the GPU, if it never waits for the host."""
        return self.compute_seconds + self.memory_seconds

    @property
    def seconds(self) -> float:
        """The longer of the GPU's and the host's, which work at the same time; on a CPU their sum."""
        return self.device_seconds + self.host_seconds if self.is_host else max(self.device_seconds, self.host_seconds)

    @property
    def limited_by(self) -> str:
        """What takes most of the time: `compute`, `memory` or `host`."""
        if self.host_seconds > self.device_seconds:
            return HOST
        return COMPUTE if self.compute_seconds >= self.memory_seconds else MEMORY

    @property
    def waits_for_host(self) -> bool:
        """Whether a GPU waits for the host most of the time; a CPU is its own host."""
        return self.limited_by == HOST and not self.is_host

    def scaled(self, device: float, host: float) -> "Cost":
        """Return the cost if the device takes `device` times as long, and the host `host` times as long."""
        return replace(
            self,
            compute_seconds=device * self.compute_seconds,
            memory_seconds=device * self.memory_seconds,
            host_seconds=host * self.host_seconds,
        )


def cost_of(operations: Iterable[tuple[int, Operation]], rates: Rates, *, host_bytes: int = 0) -> Cost:
    """Return the cost of operations, each given with how often it runs; `host_bytes` are copied from or to the host.

    Copies run in the order of the operations, as those of offloaded activations do.
    """
    compute = host = 0.0
    memory = host_bytes / rates.host_copy_bytes
    for times, operation in operations:
        arithmetic, traffic = compute_seconds(operation, rates), memory_seconds(operation, rates)
        if arithmetic > traffic:
            compute += times * arithmetic
        else:
            memory += times * traffic
        host += times * rates.dispatch_seconds
    return Cost(compute_seconds=compute, memory_seconds=memory, host_seconds=host, is_host=rates.is_host)


def compute_seconds(operation: Operation, rates: Rates) -> float:
    """Return the seconds of the arithmetic of one operation on the GPU."""
    if not operation.flops:
        return 0.0
    if operation.is_fp32:
        return operation.flops / rates.fp32_flops
    if operation.kind == OperationKind.ATTENTION and not operation.tiles:
        return operation.flops / rates.attention_flops
    return operation.flops / rates.flops / _share_busy(operation.tiles, rates.num_sms)


def memory_seconds(operation: Operation, rates: Rates) -> float:
    """Return the seconds of the traffic of one operation on the GPU, or of its launches if they take longer."""
    of_kind = {
        OperationKind.DEQUANTIZATION: rates.dequantized_bytes,
        OperationKind.LORA_GEMM: rates.narrow_bytes,
    }
    traffic = operation.num_bytes / of_kind.get(operation.kind, rates.num_bytes)
    return max(traffic, operation.kernels * rates.kernel_seconds)


def _share_busy(tiles: int, num_sms: int) -> float:
    """Return the share of multiprocessors that compute, on average over the turns in which they take the tiles."""
    if not tiles:
        return 1.0
    turns = -(-tiles // num_sms)
    return tiles / (turns * num_sms)
