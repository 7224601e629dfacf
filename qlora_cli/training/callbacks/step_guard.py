"""Stop a run before, or skip, a step whose loss or gradient norm is not finite, so that no weight is changed."""

import math
from collections.abc import Callable, Sequence

from qlora_cli.errors import TrainingError
from qlora_cli.events import Reporter, StepSkipped
from qlora_cli.settings.choices import OnNan
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.units import counted

NameRows = Callable[[int, int], tuple[str, ...]]
# A gradient scaler starts far too high, and halves until fp16 gradients are finite: 2**16 takes 17 halvings.
MOST_SCALER_SKIPS = 24


class StepGuard:
    """Checks each step before its update; one micro-batch that is not finite invalidates the whole step.

    `name_rows` takes a step and the index of a micro-batch, both from 0. `num_skipped` counts across resumes.
    """

    def __init__(self, settings: TrainingSettings, name_rows: NameRows, reporter: Reporter) -> None:
        self._settings = settings
        self._name_rows = name_rows
        self._reporter = reporter
        self._scaler_skips = 0
        self.num_skipped = 0

    def may_update(self, step: int, losses: Sequence[float], norm: float, *, is_scaled: bool) -> bool:
        """Return whether the update of `step`, which counts from 0, may be made.

        `losses` are those of its micro-batches, `norm` that of its gradients; `is_scaled` if fp16's scaler is used,
        which starts too high.

        Raises:
            TrainingError: one of them is not finite, and the run is to stop.
        """
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                self._stop_or_skip(step, f"the loss is {loss}", self._name_rows(step, index))
                return False
        if math.isfinite(norm):
            self._scaler_skips = 0
            return True
        if is_scaled and self._scaler_skips < MOST_SCALER_SKIPS:
            self._scaler_skips += 1
            reason = "fp16 gradients overflowed, and their scale is lowered"
            self._reporter.report(StepSkipped(step=step + 1, reason=reason, rows=()))
            return False
        rows = tuple(row for index in range(len(losses)) for row in self._name_rows(step, index))
        self._stop_or_skip(step, f"the gradient norm is {norm}", rows)
        return False

    def _stop_or_skip(self, step: int, reason: str, rows: tuple[str, ...]) -> None:
        if self._settings.on_nan == OnNan.STOP:
            raise TrainingError(
                f"step {step + 1}: {reason}; nothing was updated. The rows: {', '.join(rows)}",
                hint="Inspect them with qlora inspect-data. Then --on-nan skip continues without such steps; or "
                "restart with a lower --learning-rate, or with --dtype bf16 or fp32 instead of fp16.",
            )
        self.num_skipped += 1
        if self.num_skipped > self._settings.max_nan_skips:
            raise TrainingError(
                f"step {step + 1}: {reason}, as in {counted(self.num_skipped - 1, 'step')} that were skipped "
                f"before it; the rows: {', '.join(rows)}",
                hint="Restart with a lower --learning-rate, or allow more by training.max_nan_skips.",
            )
        self._reporter.report(StepSkipped(step=step + 1, reason=reason, rows=rows))
