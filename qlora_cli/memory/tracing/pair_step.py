"""The traced step of answers that are compared: before the pass with the adapter, those through the base alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_cli.adapters.calls import disable_dropout, without_adapter
from qlora_cli.loss.label_loss import LabelLoss, baseline_of
from qlora_cli.loss.preference_loss import PAIR_LOSSES, log_probs_of
from qlora_cli.memory.tracing.passes import MISMATCHED, REFERENCE
from qlora_cli.memory.tracing.training_step import Loop, StepSettings, TrainingStep

BETA = 0.1  # which decides no size
LOSS = LabelLoss(beta=BETA, desirable_weight=1.0, undesirable_weight=1.0)


class PairStep(TrainingStep):
    """The passes of a step over pairs, as `qlora train` runs it."""

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Set up the step without dropout, and undo it afterwards."""
        undo = disable_dropout(self.model)
        try:
            with super().prepared():
                yield
        finally:
            undo()

    def opening_of(self, phase: str) -> str:
        """Return the pass through the base, if there is one."""
        return f"{phase}{REFERENCE}" if self.settings.objective.has_reference else phase

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch of pairs in which every token is trained, and the tokens' losses."""
        numbers = self._num_trained(batch["labels"])
        loss = PAIR_LOSSES[self.settings.objective]
        reference = None
        if self.settings.objective.has_reference:
            with without_adapter(self.model):
                reference = loss.log_probs(self.token_losses(batch).nll, numbers)
            self.begin(self.phase.removesuffix(REFERENCE))
        losses = self.token_losses(batch)
        pairs = loss.compute(loss.log_probs(losses.nll, numbers), reference, BETA)
        return pairs.losses.sum() / len(pairs.losses), losses

    @staticmethod
    def _num_trained(labels: torch.Tensor) -> list[int]:
        """Return the tokens of each sequence: those of each row, or of one row that joins two, half of them."""
        num_rows, length = labels.shape
        if num_rows > 1:
            return [length - 1] * num_rows
        return [(length - 1) // 2, length - 1 - (length - 1) // 2]


class LabelStep(PairStep):
    """The passes of a step over answers with labels.

    Those of the baseline are traced before each micro-batch, as many as there are of these. In a run they come before
    the first one of a step, where no gradients are in memory yet.
    """

    def opening_of(self, phase: str) -> str:
        """Return the pass of the baseline through the base."""
        return f"{phase}{MISMATCHED}{REFERENCE}"

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch of answers in which every token is trained, and the tokens' losses."""
        rows, length = batch["labels"].shape
        numbers, phase = [length - 1] * rows, self.phase.removesuffix(f"{MISMATCHED}{REFERENCE}")
        with without_adapter(self.model):
            other_reference = log_probs_of(self.token_losses(batch).nll, numbers)
        self.begin(f"{phase}{MISMATCHED}")
        with torch.no_grad():
            gain = (log_probs_of(self.token_losses(batch).nll, numbers) - other_reference).sum()
            baseline = baseline_of(gain, rows)
        self.begin(f"{phase}{REFERENCE}")
        with without_adapter(self.model):
            reference = log_probs_of(self.token_losses(batch).nll, numbers)
        self.begin(phase)
        losses = self.token_losses(batch)
        of_rows = LOSS.losses(log_probs_of(losses.nll, numbers), reference, [True] * rows, baseline)
        return of_rows.sum() / rows, losses


def loop_of(settings: StepSettings) -> Loop | None:
    """Return the step of an objective that compares answers; None for that of others."""
    if settings.objective.has_labels:
        return LabelStep
    return PairStep if settings.objective.has_pairs else None
