"""What the demonstration measured. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.runs.run_result import TrainResult


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything here was measured in this run.

    `loss_before` and `loss_after` are the mean loss over the supervised tokens of the held-out rows;
    `loss_drop` is the share by which it fell. `float32_bytes` are the base's parameters in fp32,
    `quantized_bytes` all that the loaded base holds.
    """

    train: TrainResult
    float32_bytes: int
    quantized_bytes: int
    loss_before: float
    loss_after: float
    loss_drop: float
    prompt: str
    reference: str
    answer_before: str
    answer_after: str
    kept: Path | None
    total_seconds: float
