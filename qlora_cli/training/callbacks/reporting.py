"""Convert the trainer's logs to events."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.events import CheckpointSaved, EvalDone, Event, Noted, Reporter, Rewards, StepDone
from qlora_cli.hardware.counters import current_memory
from qlora_cli.loss.label_loss import KL
from qlora_cli.loss.preference_loss import ACCURACIES, LOG_SIGMOID, MARGINS, NLL
from qlora_cli.runs.directory import REPORT_FILE
from qlora_cli.runs.report.run_page import write_report
from qlora_cli.training.callbacks.step_timer import StepClock, StepTimer
from qlora_cli.training.loss_model import DFT_LOSS
from qlora_cli.training.resuming.loop_state import Progress

SECONDS_BEFORE_PAGES = 30.0  # a shorter run has one page, drawn at its end
MIN_PAUSE_FACTOR = 100  # the pause between two pages, in drawing times


class ReportingCallback(TrainerCallback):
    """Reports each logged step and evaluation, and records what the result needs in `progress`.

    `tokens_per_second` excludes the time of evaluations and checkpoints. `earlier` is the progress of earlier
    processes.
    """

    def __init__(self, reporter: Reporter, device: torch.device, timer: StepTimer, *, loading_seconds: float) -> None:
        self._reporter = reporter
        self._timer = timer
        self._device = device
        self._start = 0.0
        self._clock = StepClock()
        self._is_interrupted = False
        self._loading_seconds = loading_seconds
        self.earlier = Progress(eval_losses={})
        self.progress = replace(self.earlier, loading_seconds=loading_seconds)

    def resume_from(self, progress: Progress) -> None:
        """Continue from the progress that an earlier process reported."""
        self.earlier = progress
        self.progress = replace(progress, loading_seconds=progress.loading_seconds + self._loading_seconds)
        self._start = time.monotonic() - progress.elapsed_seconds

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        self._clock.restart()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Note that what follows until the next step is none of it."""
        self._is_interrupted = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Note that what follows until the next step is none of it."""
        self._is_interrupted = True

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock again after an evaluation or a checkpoint."""
        if self._is_interrupted:
            self._clock.restart()
            self._is_interrupted = False

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Report a step or an evaluation."""
        logs = logs or {}
        if "loss" in logs:
            self._report_step(state, logs)
        elif "eval_loss" in logs:
            self._report_evaluation(state.global_step, logs)

    def _report_evaluation(self, step: int, logs: dict[str, float]) -> None:
        loss, seconds, rewards = float(logs["eval_loss"]), float(logs["eval_runtime"]), _rewards_in(logs, "eval_")
        self.progress = replace(self.progress, eval_losses={**self.progress.eval_losses, step: loss})
        if rewards is not None:
            self.progress = replace(self.progress, eval_rewards={**self.progress.eval_rewards, step: rewards})
        is_best = self.progress.best_step == step
        if not math.isfinite(loss):
            message = f"step {step}: the held-out loss is {loss}; it counts as none"
            self._reporter.report(Noted(level="warning", message=message))
        self.progress = replace(self.progress, elapsed_seconds=time.monotonic() - self._start)
        self._reporter.report(EvalDone(step=step, loss=loss, seconds=seconds, is_best=is_best, rewards=rewards))

    def _report_step(self, state: TrainerState, logs: dict[str, float]) -> None:
        before, now, loss = self.progress, time.monotonic(), float(logs["loss"])
        rewards = _rewards_in(logs)
        num_tokens = int(logs["num_tokens"])
        tokens = num_tokens - before.num_tokens
        step = self._clock.lap(tokens)
        self.progress = replace(
            before,
            loss_sum=before.loss_sum + loss,
            num_losses=before.num_losses + 1,
            last_loss=loss,
            last_rewards=rewards,
            num_tokens=num_tokens,
            stepping_seconds=before.stepping_seconds + step.seconds,
            elapsed_seconds=now - self._start,
        )
        self._reporter.report(
            StepDone(
                step=state.global_step,
                num_steps=state.max_steps,
                epoch=float(state.epoch or 0.0),
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]),
                num_tokens=num_tokens,
                tokens_per_second=tokens / step.seconds if step.seconds > 0 else 0.0,
                elapsed_seconds=now - self._start,
                memory=current_memory(self._device),
                dft_loss=logs.get(DFT_LOSS),
                rewards=rewards,
            )
        )
        if comparison := self._timer.add(step):
            self._reporter.report(Noted(message=comparison))


def _rewards_in(logs: dict[str, float], prefix: str = "") -> Rewards | None:
    """Return the rewards that TRL's metrics tell of; None if answers are not compared."""

    def found(name: str) -> float | None:
        return None if (value := logs.get(f"{prefix}{name}")) is None else float(value)

    if (accuracy := found(ACCURACIES)) is None:
        return None
    log_sigmoid = found(LOG_SIGMOID)
    return Rewards(
        accuracy=accuracy,
        margin=found(MARGINS),
        chosen_nll=found(NLL),
        odds_ratio_loss=None if log_sigmoid is None else -log_sigmoid,
        kl=found(KL),
    )


class ReportWriter:
    """A reporter that redraws `report.html` after checkpoints and evaluations.

    Drawing reads the whole run, which takes longer and longer, so pages are skipped where drawing would take more
    than about a hundredth of the time, and at the beginning.
    """

    def __init__(self, directory: Path, reporter: Reporter) -> None:
        self._directory = directory
        self._reporter = reporter
        self._not_before = time.monotonic() + SECONDS_BEFORE_PAGES

    def report(self, event: Event) -> None:
        """Draw the page after checkpoints and evaluations."""
        start = time.monotonic()
        if isinstance(event, CheckpointSaved | EvalDone) and start >= self._not_before:
            draw_report(self._directory, self._reporter)
            now = time.monotonic()
            self._not_before = now + MIN_PAUSE_FACTOR * (now - start)


def draw_report(directory: Path, reporter: Reporter) -> None:
    """Draw `report.html` of a run; a failure to write it is reported and does not stop the training."""
    try:
        write_report(directory)
    except OSError as error:
        reporter.report(Noted(level="warning", message=f"{REPORT_FILE} can't be written: {error.strerror}"))
