"""Try the largest micro-batch, forward and backward, and the largest of an evaluation before the first step.

A run that does not fit in memory ends in its first minute, not after hours at its longest row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.events import Noted, PhaseStarted, Rehearsed, Reporter
from qlora_cli.hardware.counters import is_out_of_memory, peak_device_allocated_bytes, peak_device_reserved_bytes
from qlora_cli.ranks.group import Failure, PeerError, ProcessGroup
from qlora_cli.training.batches import Row
from qlora_cli.training.trainer import QloraTrainer

Batch = dict[str, Any]


class RehearsalError(Exception):
    """The largest micro-batch does not fit in memory; the cause is PyTorch's error."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The micro-batches to try, as rows: those of training, and one of an evaluation if there is one.

    `state_bytes` is the size of the optimizer's state on the GPU from its first step on; the trial allocates as much.
    """

    micro_batches: list[list[Row]]
    eval_rows: list[Row] | None
    collate: Callable[[list[Row]], Batch]
    state_bytes: int


class RehearsalCallback(TrainerCallback):
    """Tries the largest micro-batches as soon as the loop begins."""

    def __init__(self, trainer: QloraTrainer, rehearsal: Rehearsal, reporter: Reporter, group: ProcessGroup) -> None:
        self._trainer = trainer
        self._group = group
        self._rehearsal = rehearsal
        self._reporter = reporter

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is that of transformers
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Try the micro-batches.

        Raises:
            RehearsalError: they do not fit, here or in another process.
        """
        start = time.monotonic()
        self._reporter.report(PhaseStarted(title=self._title))
        failure: Exception | None = None
        try:
            self._try_out(args.device)
        except (RuntimeError, MemoryError) as error:
            # The others wait for the weights that this process holds, and learn of it only if it ends.
            if not is_out_of_memory(error) or self._group.shares_weights:
                raise
            failure = error
        own = [] if failure is None else [Failure.of(failure, self._group.rank)]
        failures = [one for of_process in self._group.exchange(own) for one in of_process]
        if failures:
            raise RehearsalError from failure or PeerError(failures[0])
        if never_used := self._trainer.never_used:
            layers = f"{len(never_used)} of {self._trainer.num_adapted} layers with an adapter"
            message = f"the model does not call {layers} in its largest micro-batch, such as {never_used[0]}"
            self._reporter.report(Noted(level="warning", message=message))
        largest = self._rehearsal.micro_batches[0]
        self._reporter.report(
            Rehearsed(
                micro_batch_size=len(largest),
                longest_row_tokens=max(len(row["input_ids"]) for row in largest),
                seconds=time.monotonic() - start,
                device_allocated_bytes=peak_device_allocated_bytes(args.device),
                device_reserved_bytes=peak_device_reserved_bytes(args.device),
            )
        )

    @property
    def _title(self) -> str:
        title = "Trying the largest micro-batch"
        return f"{title} and compiling the layers" if self._trainer.is_compiled else title

    def _try_out(self, device: torch.device) -> None:
        rehearsal = self._rehearsal
        has_state = bool(self._trainer.optimizer.state)  # of a resumed run
        num_bytes = 0 if has_state or device.type != "cuda" else rehearsal.state_bytes
        placeholder = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._trainer.try_out([rehearsal.collate(rows) for rows in rehearsal.micro_batches])
        if rehearsal.eval_rows is not None:
            self._trainer.try_out_evaluation(rehearsal.collate(rehearsal.eval_rows))
        del placeholder
