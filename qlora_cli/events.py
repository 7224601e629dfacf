"""What a run reports while it goes on.

The core says verbs and knows nothing of terminals: it hands frozen events to a `Reporter`. The command
line draws them; the run directory writes them to `metrics.jsonl`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory in use now, in bytes. The device figures are None without a GPU."""

    host_bytes: int
    device_allocated_bytes: int | None = None
    device_reserved_bytes: int | None = None
    device_total_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """The run turned to something else that takes time, such as "Loading the model"."""

    title: str


@dataclass(frozen=True, kw_only=True)
class BytesDone:
    """A transfer went on: so many of so many bytes. Each kind has a bar of its own."""

    kind: Literal["download", "quantize", "load"]
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Noted:
    """Something a user should know. A warning when a setting was lowered or data were lost."""

    message: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, kw_only=True)
class TrainingStarted:
    """The first step is next."""

    num_steps: int
    output: Path


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step. `loss` is the mean over the supervised tokens of the step."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    elapsed_seconds: float
    memory: MemoryUse


@dataclass(frozen=True, kw_only=True)
class EvalStarted:
    """An evaluation pass over the held-out rows began."""

    step: int


@dataclass(frozen=True, kw_only=True)
class EvalDone:
    """`loss` is the mean over the supervised tokens of the evaluation set, as the trainer batches it."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class TrainingEnded:
    """The loop is over: all steps done, or stopped by a signal."""

    step: int
    num_steps: int
    interrupted_by: str | None


Event = (
    PhaseStarted
    | BytesDone
    | Noted
    | TrainingStarted
    | StepDone
    | EvalStarted
    | EvalDone
    | CheckpointSaved
    | TrainingEnded
)


class Reporter(Protocol):
    """Receives events, in order, on the thread that trains; must return quickly and must not raise."""

    def report(self, event: Event) -> None:
        """Take one event."""


class SilentReporter:
    """Drops every event: for library use."""

    def report(self, event: Event) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Reporters:
    """Passes every event on to each of `members`."""

    members: Sequence[Reporter]

    def report(self, event: Event) -> None:
        """Pass `event` on."""
        for member in self.members:
            member.report(event)
