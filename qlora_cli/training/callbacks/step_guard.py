"""Stop a run before, or skip, a step whose loss or gradient norm is not finite, so that no weight is changed."""

import math
from collections.abc import Callable

import torch

from qlora_cli.errors import TrainingError
from qlora_cli.events import Reporter, StepSkipped
from qlora_cli.settings.choices import OnNan
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.units import counted

NameRows = Callable[[int, int], tuple[str, ...]]
# A gradient scaler starts far too high, and halves until fp16 gradients are finite: 2**16 takes 17 halvings.
MOST_SCALER_SKIPS = 24


class StepGuard:
    """Watches the micro-batches of a step; one that is not finite invalidates the whole step.

    `name_rows` takes a step and the index of a micro-batch, both from 0. `num_skipped` counts across resumes.
    """

    def __init__(self, settings: TrainingSettings, name_rows: NameRows, reporter: Reporter) -> None:
        self._settings = settings
        self._name_rows = name_rows
        self._reporter = reporter
        self._micro_batch = 0
        self._fault: tuple[str, tuple[str, ...]] | None = None
        self._scaler_skips = 0
        self.num_skipped = 0

    def begin_step(self) -> None:
        """Reset the state of the previous step."""
        self._micro_batch = 0
        self._fault = None

    @property
    def is_skipping(self) -> bool:
        """Whether the step in progress, or the one that has just ended, is skipped."""
        return self._fault is not None

    def check_loss(self, step: int, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of the next micro-batch of `step`, which counts from 0; 0 if it is not finite.

        Raises:
            TrainingError: it is not finite, and the run is to stop.
        """
        index, self._micro_batch = self._micro_batch, self._micro_batch + 1
        if bool(torch.isfinite(loss)):
            return loss
        self._stop_or_skip(step, f"the loss is {float(loss)}", self._name_rows(step, index))
        return torch.zeros_like(loss)

    def check_norm(self, step: int, norm: float, *, is_scaled: bool) -> bool:
        """Return whether the update may be made; `is_scaled` if fp16's scaler is used, which starts too high.

        Raises:
            TrainingError: the norm is not finite, and the run is to stop.
        """
        if self.is_skipping:
            return False
        if math.isfinite(norm):
            self._scaler_skips = 0
            return True
        if is_scaled and self._scaler_skips < MOST_SCALER_SKIPS:
            self._scaler_skips += 1
            self._fault = ("fp16 gradients overflowed, and their scale is lowered", ())
            self._reporter.report(StepSkipped(step=step + 1, reason=self._fault[0], rows=()))
            return False
        rows = tuple(row for index in range(self._micro_batch) for row in self._name_rows(step, index))
        self._stop_or_skip(step, f"the gradient norm is {norm}", rows)
        return False

    def _stop_or_skip(self, step: int, reason: str, rows: tuple[str, ...]) -> None:
        if self._settings.on_nan == OnNan.STOP:
            raise TrainingError(
                f"step {step + 1}: {reason}; nothing was updated. The rows: {', '.join(rows)}",
                hint="Inspect them with qlora inspect-data. Then --on-nan skip continues without such steps; or "
                "restart with a lower --learning-rate, or with --dtype bf16 or fp32 instead of fp16.",
            )
        if self._fault is not None:
            return
        self._fault = (reason, rows)
        self.num_skipped += 1
        if self.num_skipped > self._settings.max_nan_skips:
            raise TrainingError(
                f"step {step + 1}: {reason}, as in {counted(self.num_skipped - 1, 'step')} that were skipped "
                f"before it; the rows: {', '.join(rows)}",
                hint="Restart with a lower --learning-rate, or allow more by training.max_nan_skips.",
            )
        self._reporter.report(StepSkipped(step=step + 1, reason=reason, rows=rows))
