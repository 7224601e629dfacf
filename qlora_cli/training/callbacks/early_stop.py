"""Stop when the held-out loss no longer falls."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.events import Noted, Reporter
from qlora_cli.training.callbacks.reporting import ReportingCallback
from qlora_cli.units import counted


class EarlyStopCallback(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a new best, counted across resumes."""

    def __init__(self, reporting: ReportingCallback, patience: int, reporter: Reporter) -> None:
        self._reporting = reporting
        self._patience = patience
        self._reporter = reporter

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is that of transformers
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Ask the trainer to save and stop if patience is exhausted."""
        since_best = self._reporting.progress.num_since_best
        if since_best < self._patience or state.global_step >= state.max_steps:
            return
        control.should_save = True
        control.should_training_stop = True
        message = f"no better held-out loss in {counted(since_best, 'evaluation')}: training ends early"
        self._reporter.report(Noted(message=f"{message}, after step {state.global_step:,}"))
