"""The state of a run in progress, computed from its events, for both displays."""

from dataclasses import dataclass, field

from qlora_cli.cli.progress.event_text import describe_event
from qlora_cli.cli.progress.smoothed_loss import SmoothedLoss
from qlora_cli.cli.sparkline import SparklineCurve
from qlora_cli.events import (
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    Event,
    PhaseStarted,
    Rehearsed,
    StepDone,
    StepSkipped,
    TrainingResumed,
    TrainingStarted,
    WorkAdvanced,
)
from qlora_cli.units import counted


@dataclass(kw_only=True)
class RunState:
    """The current state of a run. One thread updates it while another may draw it: each field is consistent by itself.

    `step` is the last step, done or skipped; `best_eval` is the best evaluation in this process, if it was the best of
    the run; `checkpoint_time` is a time of the clock that `update` gets.
    """

    status: str = ""
    started: TrainingStarted | None = None
    resumed: TrainingResumed | None = None
    step: int = 0
    last_step: StepDone | None = None
    loss: SmoothedLoss = field(default_factory=SmoothedLoss)
    losses: SparklineCurve = field(default_factory=SparklineCurve)
    last_eval: EvalDone | None = None
    best_eval: EvalDone | None = None
    checkpoint: CheckpointSaved | None = None
    checkpoint_time: float = 0.0
    num_skipped: int = 0
    seconds_left: float | None = None
    _pace_since: tuple[int, float] | None = (0, 0.0)  # step and its elapsed seconds

    @property
    def predicted_reserved_bytes(self) -> int | None:
        """The predicted peak of the caching allocator; None without a prediction."""
        return None if self.started is None else self.started.predicted_reserved_bytes

    @property
    def num_epochs(self) -> float | None:
        """The number of epochs; None of a stream."""
        return None if self.started is None else self.started.num_epochs

    def update(self, event: Event, now: float) -> None:
        """Handle an event, which arrived at `now` of a monotonic clock, in seconds."""
        match event:
            case StepDone():
                self._take_step(event)
            case PhaseStarted() | EvalStarted() | WorkAdvanced():
                self.status = describe_event(event) or ""
            case TrainingStarted():
                self.started = event
                self._expect(event.num_steps)
                self._show_training()
            case TrainingResumed():
                self.resumed, self.step = event, event.step
                self._pace_since = None  # elapsed seconds may or may not count those of the earlier process
                self._expect(event.num_steps - event.step)
            case Rehearsed():
                self._show_training()
            case StepSkipped():
                self.step = event.step
                self.num_skipped += 1
            case EvalDone():
                self.last_eval = event
                if event.is_best:
                    self.best_eval = event
                self._show_training()
            case CheckpointSaved():
                self.checkpoint_time = now
                self.checkpoint = event

    def _expect(self, num_steps: int) -> None:
        """Expect the predicted time of all remaining steps, until the first ones tell."""
        seconds = None if self.started is None else self.started.predicted_step_seconds
        if seconds is not None:
            self.seconds_left = num_steps * seconds

    def _take_step(self, step: StepDone) -> None:
        self.loss.add(step.loss)
        self.losses.add(step.loss)
        self.step, self.last_step = step.step, step
        if self._pace_since is None:
            self._pace_since = (step.step, step.elapsed_seconds)
            self._expect(step.num_steps - step.step)
            return
        since_step, since_seconds = self._pace_since
        pace = (step.elapsed_seconds - since_seconds) / max(1, step.step - since_step)
        self.seconds_left = pace * (step.num_steps - step.step)

    def _show_training(self) -> None:
        if self.started is not None:
            self.status = f"Training {counted(self.started.num_steps, 'step')}"
