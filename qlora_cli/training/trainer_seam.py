"""The private side of transformers' and TRL's trainers: every method overridden there, every counter read or set.

A version of theirs that renames one breaks this module and no other; `tests/contract/test_seams.py` says which.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch.utils.data import Sampler
from trl import SFTTrainer

from qlora_cli.loss.preference_loss import CHOSEN_REWARDS, MARGINS, REJECTED_REWARDS


@dataclass(frozen=True, kw_only=True)
class LoopCounters:
    """The counters of the trainers.

    Attributes:
        summed_loss: The loss of the steps not reported yet, with `logging_steps` above 1.
        total_loss: The loss of the steps that were reported.
        reported_step: The last reported step.
        num_tokens: The tokens trained so far, without padding.
        means: The values that TRL will report the mean of, by name.
    """

    summed_loss: float
    total_loss: float
    reported_step: int
    num_tokens: int
    means: Mapping[str, list[float]]

    @classmethod
    def of(cls, state: object) -> Self:
        """Return the attributes of `state` by these names."""
        return cls(**{field.name: getattr(state, field.name) for field in fields(cls)})


class TrainerSeam(SFTTrainer, ABC):
    """`SFTTrainer` with public hooks where it has private methods, and its counters as one value."""

    @abstractmethod
    def train_sampler(self) -> Sampler[int] | None:
        """Return the sampler of rows; None to use them in order."""

    @abstractmethod
    def on_grad_norm(self, model: torch.nn.Module, norm: torch.Tensor) -> float:
        """Called with the norm of the gradients, after clipping and before the optimizer's step; returns its value."""

    @abstractmethod
    def on_step_reported(self) -> None:
        """Called when a step is over: counted, and logged, evaluated and saved where that was due."""

    @abstractmethod
    def save_checkpoint(self) -> None:
        """Write a checkpoint of the step; `write_checkpoint` writes what the trainer itself keeps."""

    @abstractmethod
    def save_weights(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the weights into the checkpoint `folder`."""

    @abstractmethod
    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint."""

    @abstractmethod
    def optimizer_loading(self, checkpoint: Path) -> AbstractContextManager[None]:
        """Return what surrounds the loading of the optimizer's and the schedule's state."""

    @abstractmethod
    def scaler_loading(self, checkpoint: Path) -> AbstractContextManager[None]:
        """Return what surrounds the loading of the loss scaler's state."""

    @abstractmethod
    def restore_generators(self, checkpoint: Path) -> None:
        """Give the random generators the states of a checkpoint, when the first step after it is next."""

    def write_checkpoint(self, folder: Path) -> Path:
        """Write weights, optimizer, schedule, scaler, generators and trainer state below `folder`; return where."""
        before, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            # TRL's own override only adds a model card to the output directory.
            super(SFTTrainer, self)._save_checkpoint(self.model, None)
        finally:
            self.args.output_dir = before
        return folder / f"checkpoint-{self.state.global_step}"

    def counters(self) -> LoopCounters:
        """Return what is counted by now."""
        return LoopCounters(
            summed_loss=float(self._tr_loss),
            total_loss=self._total_loss_scalar,
            reported_step=self._globalstep_last_logged,
            num_tokens=int(self._total_train_tokens),
            means={name: list(values) for name, values in self.means_of("train").items()},
        )

    def set_counters(self, counters: LoopCounters) -> None:
        """Continue counting from `counters`."""
        # On the host, where it is read after each step.
        self._tr_loss = torch.tensor(counters.summed_loss)
        self._total_loss_scalar = counters.total_loss
        self._globalstep_last_logged = counters.reported_step
        self._total_train_tokens = counters.num_tokens
        for name, values in counters.means.items():
            self.means_of("train")[name] = list(values)

    def add_losses(self, losses: Sequence[float]) -> None:
        """Add the losses of the micro-batches of a step to the sum, in fp32 as the trainer does."""
        for loss in losses:
            self._tr_loss += loss

    def leave_step_out(self) -> None:
        """Leave the step in progress, whose losses are not added, out of the mean loss."""
        self._globalstep_last_logged += 1

    def end_micro_batch(self) -> None:
        """Notify callbacks, as the trainer does between the micro-batches that it knows of."""
        handler: Any = self.callback_handler
        handler.on_substep_end(self.args, self.state, self.control)

    def add_metrics(self, mode: str, metrics: Iterable[Mapping[str, float]], num_tokens: int) -> None:
        """Add the metrics of micro-batches, whose means TRL reports, and their number of trained tokens.

        `mode` is `train` or `eval`.
        """
        self._total_train_tokens += num_tokens
        means = self.means_of(mode)
        means["num_tokens"] = [self._total_train_tokens]
        for of_batch in metrics:
            for name, value in of_batch.items():
                means[name].append(value)

    def add_margin(self, mode: str) -> None:
        """Add how much higher the rewards of wanted answers are, if no metric of single rows says so, as in a pair."""
        means = self.means_of(mode)
        if MARGINS not in means and CHOSEN_REWARDS in means and REJECTED_REWARDS in means:
            means[MARGINS] = [fmean(means[CHOSEN_REWARDS]) - fmean(means[REJECTED_REWARDS])]

    def means_of(self, mode: str) -> defaultdict[str, list[float]]:
        """Return the values that TRL will report the mean of, by name; `mode` is `train` or `eval`."""
        of_mode: defaultdict[str, list[float]] = self._metrics[mode]
        return of_mode

    # ---- overridden ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:  # noqa: ARG002
        return self.train_sampler()

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.on_grad_norm(model, norm)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.on_step_reported()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # noqa: ARG002
        self.save_checkpoint()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None, "the trainer names the folder of a checkpoint"
        self.save_weights(Path(output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self.optimizer_loading(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self.scaler_loading(Path(checkpoint)):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.restore_generators(Path(checkpoint))
