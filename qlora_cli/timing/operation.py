"""The operations of a training step, as a roofline needs them. Imports no torch."""

from dataclasses import dataclass
from enum import StrEnum


class OperationKind(StrEnum):
    """What an operation belongs to."""

    BASE_GEMM = "base GEMM"
    DEQUANTIZATION = "dequantization"
    LORA_GEMM = "LoRA GEMM"
    LORA = "LoRA element-wise"
    NORM = "norm"
    ROPE = "RoPE"
    MLP = "SwiGLU"
    ATTENTION = "attention"
    LOSS = "loss"
    RESIDUAL = "residual"
    EMBEDDING = "embedding"
    OPTIMIZER = "optimizer"
    OTHER = "other"


class Pass(StrEnum):
    """When an operation runs."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Operation:
    """A call of an operator.

    Attributes:
        flops: Of its products.
        num_bytes: Read from and written to the GPU's memory.
        kernels: How many it launches; none: it takes time of the host alone.
        is_known: False if it is counted by its bytes alone, though it may compute more.
        is_fp32: Whether its products are of fp32 values, which tensor cores do not multiply.
        tiles: The blocks of 128 by 128 results of a product, each of which one multiprocessor computes; 0 for those
            that are divided in another way.
    """

    run_in: Pass
    kind: OperationKind
    operator: str
    flops: int = 0
    num_bytes: int = 0
    kernels: int = 0
    is_known: bool = True
    is_fp32: bool = False
    tiles: int = 0


Counted = tuple[tuple[int, Operation], ...]  # each operation with how often it runs
