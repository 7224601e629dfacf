"""Train and measure trials one after another on one loaded base: each begins with the same adapter and draws.

A trial computes what `qlora train` would with its learning rate and as many steps, and writes nothing.
"""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.errors import TrainingError
from qlora_cli.evaluating.losses import RowLosses, measure_losses
from qlora_cli.evaluating.paired_losses import LossesOfRows, judge
from qlora_cli.events import Event, Noted, Reporter, StepDone, WorkAdvanced
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.settle import with_settings
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.out_of_resources import explained
from qlora_cli.training.rehearsal import RehearsalError
from qlora_cli.training.resuming.loop_state import preserve_generators
from qlora_cli.training.run_plan import PreparedRun, SettledRun, load_run
from qlora_cli.training.session import Session
from qlora_cli.tuning.tuning_record import KeptTrial
from qlora_cli.writing import staging

MOST_ROWS = 512  # held-out rows that are measured: their loss has a smaller error than the choice needs
ROWS_AT_ONCE = 8  # halved where they do not fit


class TrialBench:
    """The base of a settled run, loaded for the first trial, and the rows that all trials are measured on."""

    def __init__(self, settled: SettledRun, directory: Path, reporter: Reporter) -> None:
        self._settled = settled
        self._directory = directory
        self._reporter = reporter
        self.rows = measured_rows(settled)

    @cached_property
    def _prepared(self) -> PreparedRun:
        return load_run(self._settled, self._reporter)

    @cached_property
    def _initial(self) -> dict[str, torch.Tensor]:
        return {name: values.detach().cpu().clone() for name, values in self._trainable()}

    def _trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self._prepared.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def measure(self, title: str) -> RowLosses:
        """Return the losses of the held-out rows with the adapter as it is now."""
        loaded = self._prepared.loaded
        return measure_losses(
            self._prepared.model,
            self.rows,
            pad_token_id=loaded.tokenizer.pad_token_id,
            dtype=loaded.dtype.torch_dtype,
            batch_size=ROWS_AT_ONCE,
            title=title,
            reporter=self._reporter,
        )

    def run(self, learning_rate: float, num_steps: int, start: LossesOfRows) -> KeptTrial:
        """Return a trial, which diverged if its loss is not finite, or clearly above that before training, `start`.

        Raises:
            OutOfMemoryError: it does not fit.
        """
        started, row_nll = time.monotonic(), None
        with self._from_the_start(), preserve_generators():
            diverged = self._train(learning_rate, num_steps)
            if diverged is None:
                losses = self.measure(_title(learning_rate))
                diverged = _divergence(replace(start, nll=losses.nll), start)
                row_nll = tuple(losses.nll.tolist()) if np.isfinite(losses.nll).all() else None
        return KeptTrial(
            learning_rate=learning_rate,
            num_steps=num_steps,
            row_nll=row_nll,
            diverged=diverged,
            seconds=time.monotonic() - started,
        )

    @contextmanager
    def _from_the_start(self) -> Iterator[None]:
        """Give the adapter the values that it began with, and what a trial has left on the device back after it."""
        initial = self._initial
        with torch.no_grad():
            for name, parameter in self._trainable():
                parameter.copy_(initial[name])
        yield
        gc.collect()
        torch.cuda.empty_cache()

    def _train(self, learning_rate: float, num_steps: int) -> str | None:
        """Train; return why the trial ended before its last step, or None."""
        prepared, reporter = self._trial(learning_rate, num_steps), TrialReporter(self._reporter, learning_rate)
        with staging(self._directory / "trial") as folder:
            session = Session(prepared, RunDirectory(folder), reporter, StopSignal(reporter))
            session.trainer.add_callback(UnsavedCallback())
            try:
                session.trainer.train()
            except TrainingError as error:  # a loss or a gradient that is not finite
                return str(error).partition(";")[0]
            except Exception as error:
                explanation = explained(error, prepared, session.trainer.phase, "", step=session.step)
                if explanation is error and not isinstance(error, RehearsalError):
                    raise
                raise explanation from error
            finally:
                session.trainer.abandon()
        return None

    def _trial(self, learning_rate: float, num_steps: int) -> PreparedRun:
        prepared = self._prepared
        settings = with_settings(
            prepared.settings, {"training.learning_rate": learning_rate, "training.max_steps": num_steps}
        )
        return replace(
            prepared,
            resolved=replace(prepared.resolved, settings=settings),
            plan=replace(prepared.plan, num_steps=num_steps, output=self._directory),
        )


class UnsavedCallback(TrainerCallback):
    """Keeps the trainer from writing checkpoints."""

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is that of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Save nothing."""
        control.should_save = False


class TrialReporter:
    """Passes the steps of a trial on as the progress of its learning rate, and warnings as they are."""

    def __init__(self, reporter: Reporter, learning_rate: float) -> None:
        self._reporter = reporter
        self._title = _title(learning_rate)

    def report(self, event: Event) -> None:
        """Handle an event."""
        if isinstance(event, StepDone):
            pace = event.elapsed_seconds / event.step
            self._reporter.report(
                WorkAdvanced(
                    title=f"{self._title}, loss {event.loss:.4f}",
                    unit="step",
                    num_done=event.step,
                    num_all=event.num_steps,
                    seconds_left=pace * (event.num_steps - event.step),
                )
            )
        elif isinstance(event, Noted) and event.level == "warning":
            self._reporter.report(event)


def _title(learning_rate: float) -> str:
    return f"learning rate {learning_rate:g}"


def _divergence(trial: LossesOfRows, start: LossesOfRows) -> str | None:
    if not math.isfinite(trial.loss):
        return f"the held-out loss is {trial.loss}"
    is_worse = judge(trial, start, margin=0.0) == "worse"
    return f"the held-out loss is {trial.loss:.4f}, {start.loss:.4f} before training" if is_worse else None


def measured_rows(settled: SettledRun) -> PreparedData:
    """Return the held-out rows to measure: all, or as many as are enough, evenly spaced."""
    held_out = settled.rows.evaluation
    assert held_out is not None, "settled with held-out rows"
    total = len(held_out.lengths)
    if total <= MOST_ROWS:
        return held_out
    chosen = np.linspace(0, total - 1, MOST_ROWS).round().astype(np.int64)
    return replace(
        held_out,
        dataset=held_out.dataset.select(chosen),
        lengths=held_out.lengths[chosen],
        padded_lengths=held_out.padded_lengths[chosen],
        selected=held_out.selected[chosen],
    )
