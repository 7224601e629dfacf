"""The result of the demonstration. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.runs.run_result import TrainResult


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The measurements of the demonstration.

    `loss_before` and `loss_after` are the mean loss over the trained tokens of the held-out rows, and `loss_drop`
    is the relative decrease. `float32_bytes` is the size of the base's parameters in fp32, `quantized_bytes` that of
    the loaded base.
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
