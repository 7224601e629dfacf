"""The traced step of pairs: before the pass with the adapter, one through the base alone if that is the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_cli.adapters.calls import disable_dropout, without_adapter
from qlora_cli.loss.preference_loss import PAIR_LOSSES
from qlora_cli.memory.tracing.passes import REFERENCE
from qlora_cli.memory.tracing.training_step import Loop, StepSettings, TrainingStep

BETA = 0.1  # which decides no size


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


def loop_of(settings: StepSettings) -> Loop | None:
    """Return the step of pairs if rows are pairs; None for that of single rows."""
    return PairStep if settings.objective.compares else None
