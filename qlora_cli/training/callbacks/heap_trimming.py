"""On a CPU, bound the memory that batches of ever new lengths leave behind."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.hardware.heap import return_freed_memory

# After each batch it took 19 % more time of a step of the bundled model, since the memory is needed again at once.
BATCHES_BETWEEN = 10


class HeapTrimming(TrainerCallback):
    """Returns freed memory to the system after every tenth micro-batch."""

    def __init__(self) -> None:
        self._num_batches = 0

    def on_substep_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Count a micro-batch that no update follows."""
        self._count()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Count the last micro-batch of a step."""
        self._count()

    def _count(self) -> None:
        self._num_batches += 1
        if self._num_batches % BATCHES_BETWEEN == 0:
            return_freed_memory()
