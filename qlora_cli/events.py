"""Events that a run reports while it is in progress.

The core knows nothing of terminals: it passes frozen events to a `Reporter`. The command line renders them; the run
directory writes them to `metrics.jsonl`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from qlora_cli.units import Whole


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory in use now, in bytes. The device figures are None without a GPU."""

    host_bytes: Whole
    device_allocated_bytes: Whole | None = None
    device_reserved_bytes: Whole | None = None
    device_total_bytes: Whole | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """The run began a phase that takes time, such as "Loading the model"."""

    title: str


@dataclass(frozen=True, kw_only=True)
class BytesDone:
    """A transfer progressed to `done_bytes` of `total_bytes`. Each kind has its own progress bar."""

    kind: Literal["download", "quantize", "load", "merge"]
    done_bytes: Whole
    total_bytes: Whole


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A note for the user; a warning if a setting was lowered or data were lost."""

    message: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, kw_only=True)
class TrainingStarted:
    """The first step is next.

    The predictions are its peaks on the GPU, in bytes, and the seconds of a step; None where they are not known.
    `num_epochs` is None for a stream, of which nobody knows the end.
    """

    num_steps: Whole
    output: Path
    num_epochs: float | None = None
    predicted_allocated_bytes: Whole | None = None
    predicted_reserved_bytes: Whole | None = None
    predicted_step_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingResumed:
    """Training resumed after `step`. Earlier reports of later steps are no longer valid."""

    step: Whole
    num_steps: Whole
    checkpoint: Path


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Before the first step, the largest micro-batch ran forward and backward, and one of the evaluation forward.

    The device figures are the peaks measured in it, in bytes; None without a GPU.
    """

    micro_batch_size: Whole
    longest_row_tokens: Whole
    seconds: float
    device_allocated_bytes: Whole | None
    device_reserved_bytes: Whole | None


@dataclass(frozen=True, kw_only=True)
class StepSkipped:
    """A step whose loss or gradient norm was not finite changed nothing. `rows` are those of the batch."""

    step: Whole
    reason: str
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """What a model that is trained by comparison makes of pairs of answers, or of answers with labels, on average.

    `accuracy` is the share of pairs whose chosen answer has the higher reward: `training.beta` times how much more
    likely it became, in nats, or with ORPO, times the log-probability of a token. `margin` is the reward of the chosen
    answer less that of the other. Of the parts of ORPO's loss, `chosen_nll` is that of the chosen answers, in nats a
    token, and `odds_ratio_loss` that of the comparison, before it is multiplied with beta; other objectives have none.

    Of answers with labels, `accuracy` is the share of those whose reward is above the baseline if they are wanted, and
    below it if not; `margin` is the mean reward of the wanted ones less that of the others, None if one kind is
    missing. `kl` is the baseline divided by beta, in nats; None of pairs, which have none.
    """

    accuracy: float
    margin: float | None
    chosen_nll: float | None = None
    odds_ratio_loss: float | None = None
    kl: float | None = None

    @property
    def rows(self) -> str:
        """What these are means over: pairs, or answers."""
        return "pairs" if self.kl is None else "answers"

    def margin_text(self, separator: str) -> str:
        """Return the margin after a separator, if there is one."""
        return "" if self.margin is None else f"{separator}margin {self.margin:.3f}"

    def __str__(self) -> str:
        nll = "" if self.chosen_nll is None else f", chosen NLL {self.chosen_nll:.4f}"
        kl = "" if self.kl is None else f", KL {self.kl:.3f}"
        return f"reward accuracy {self.accuracy:.0%}{self.margin_text(', ')}{nll}{kl}"


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step. `loss` is the mean over the trained tokens of the step, of their negative log-likelihood.

    `dft_loss` is the mean of what is trained on instead with `training.loss` dft. Where answers are compared, which
    alone have `rewards`, the loss is the mean over the pairs, or over the answers with labels.
    """

    step: Whole
    num_steps: Whole
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: Whole
    tokens_per_second: float
    elapsed_seconds: float
    memory: MemoryUse
    dft_loss: float | None = None
    rewards: Rewards | None = None


@dataclass(frozen=True, kw_only=True)
class EvalStarted:
    """An evaluation pass over the held-out rows began."""

    step: Whole


@dataclass(frozen=True, kw_only=True)
class WorkAdvanced:
    """Work without steps, such as "Evaluating the base", progressed to `num_done` of `num_all` units."""

    title: str
    unit: Literal["row", "request", "layer", "step"]
    num_done: Whole
    num_all: Whole
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class EvalDone:
    """An evaluation pass ended. `loss` is the mean over the trained tokens of the held-out rows; see `StepDone`.

    `is_best`: no earlier evaluation of the run was better. `rewards` are those of answers that are compared.
    """

    step: Whole
    loss: float
    seconds: float
    is_best: bool
    rewards: Rewards | None = None


@dataclass(frozen=True, kw_only=True)
class SampleDone:
    """A sample prompt was answered, greedily; step 0 is the base before training."""

    step: Whole
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    step: Whole
    path: Path


@dataclass(frozen=True, kw_only=True)
class TrainingEnded:
    """The loop is over: all steps done, or stopped by a signal."""

    step: Whole
    num_steps: Whole
    interrupted_by: str | None


Event = (
    PhaseStarted
    | BytesDone
    | Noted
    | TrainingStarted
    | TrainingResumed
    | Rehearsed
    | StepSkipped
    | StepDone
    | EvalStarted
    | WorkAdvanced
    | EvalDone
    | SampleDone
    | CheckpointSaved
    | TrainingEnded
)


class Reporter(Protocol):
    """Receives events, in order, on the thread that trains; must return quickly and must not raise."""

    def report(self, event: Event) -> None:
        """Handle an event."""


class SilentReporter:
    """Ignores all events, for library use."""

    def report(self, event: Event) -> None:
        """Do nothing."""


class Reporters:
    """Passes each event to all `members`, one event after another.

    The handler of a signal reports in the middle of whatever the thread is doing. If that is a report, a stream can't
    be written again before it has returned, so the event of the handler follows then.
    """

    def __init__(self, members: Sequence[Reporter]) -> None:
        self._members = members
        self._is_reporting = False
        self._deferred: deque[Event] = deque()

    def report(self, event: Event) -> None:
        """Pass `event` on."""
        self._deferred.append(event)
        if self._is_reporting:
            return
        self._is_reporting = True
        try:
            while self._deferred:
                following = self._deferred.popleft()
                for member in self._members:
                    member.report(following)
        finally:
            self._is_reporting = False
