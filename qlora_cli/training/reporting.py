"""Translate what the trainer logs into events."""

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.errors import TrainingError
from qlora_cli.events import EvalDone, Reporter, StepDone
from qlora_cli.memory.measure import current_memory


class ReportingCallback(TrainerCallback):
    """Reports each logged step and evaluation, and remembers what the result needs.

    Evaluation time is left out of `tokens_per_second`.
    """

    def __init__(self, reporter: Reporter, device: torch.device) -> None:
        self._reporter = reporter
        self._device = device
        self._start = self._last_time = 0.0
        self._last_tokens = 0
        self.losses: list[float] = []
        self.eval_losses: dict[int, float] = {}
        self.num_tokens = 0
        self.stepping_seconds = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Start the clock."""
        self._start = self._last_time = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Report a step or an evaluation.

        Raises:
            TrainingError: the loss or the gradient norm is not a finite number.
        """
        logs = logs or {}
        if "loss" in logs:
            self._report_step(state, logs)
        elif "eval_loss" in logs:
            loss = float(logs["eval_loss"])
            self.eval_losses[state.global_step] = loss
            seconds = float(logs["eval_runtime"])
            self._last_time = time.monotonic()
            self._reporter.report(EvalDone(step=state.global_step, loss=loss, seconds=seconds))

    def _report_step(self, state: TrainerState, logs: dict[str, float]) -> None:
        loss, grad_norm = float(logs["loss"]), float(logs["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {state.global_step}: the loss is {loss} and the gradient norm {grad_norm}",
                hint="Lower --learning-rate; with fp16, try --dtype bf16 or fp32.",
            )
        now = time.monotonic()
        self.num_tokens = int(logs["num_tokens"])
        seconds, tokens = now - self._last_time, self.num_tokens - self._last_tokens
        self._last_time, self._last_tokens = now, self.num_tokens
        self.stepping_seconds += seconds
        self.losses.append(loss)
        self._reporter.report(
            StepDone(
                step=state.global_step,
                num_steps=state.max_steps,
                epoch=float(state.epoch or 0.0),
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=grad_norm,
                num_tokens=self.num_tokens,
                tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
                elapsed_seconds=now - self._start,
                memory=current_memory(self._device),
            )
        )
