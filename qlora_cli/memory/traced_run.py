"""What a traced run allocates and computes, and the micro-batches that it is traced with."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from qlora_cli.memory.costs.run_files import FileSizes
from qlora_cli.memory.replaying.replay import RunEvents
from qlora_cli.memory.tracing.shards import ShardedBase
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.operation import Counted


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """The allocations and operations of a run on every GPU with the same kernels.

    Attributes:
        events: Those that a replay needs.
        micro_batch: The operations of a micro-batch.
        update: The operations of the optimizer's step.
        backends: The attention kernels that the run uses, by name.
        paged_bytes: Optimizer state in unified memory.
        pinned_host_bytes: Activations in host memory, of all layers.
        num_trained: Trained parameters.
        files: The sizes of the files of the run.
        sharded: How the base is divided among processes; None if each holds all of it.
        notes: Messages from attaching the adapter.
    """

    events: RunEvents
    micro_batch: Counted
    update: Counted
    backends: tuple[str, ...]
    paged_bytes: int
    pinned_host_bytes: int
    num_trained: int
    files: FileSizes
    sharded: ShardedBase | None
    notes: tuple[str, ...]


def micro_batches_of(settings: EstimateSettings) -> dict[str, Any]:
    """Return the sequences of the largest micro-batch, how they are joined, and how many there are in a step."""
    training, length, longest = settings.training, settings.data.max_length, settings.longest_row_tokens
    size, accumulation = training.micro_batch_size, training.micro_batches_per_process
    if training.micro_batch_tokens is None:
        size *= training.objective.num_sequences
        return {
            "batch_size": size,
            "length": length,
            "gradient_accumulation_steps": accumulation,
            "is_packed": settings.data.packing,
            # Rows of different lengths are the usual case, and their mask takes memory.
            "is_padded": size > 1 and not settings.data.packing,
        }
    num_rows, tokens = training.rows_per_process, training.micro_batch_tokens
    return {
        "batch_size": 1,
        "length": max(longest, min(tokens, num_rows * longest)),
        "gradient_accumulation_steps": ceil(num_rows / max(1, tokens // longest)),
        "is_packed": num_rows > 1 or training.objective.has_pairs,
    }


def checkpointing_of(settings: EstimateSettings) -> Checkpointing:
    """Return the checkpointing of a run that is not planned: what is left open is on, which takes least on a GPU."""
    asked = settings.training.gradient_checkpointing
    return Checkpointing.ON if asked == Checkpointing.AUTO else asked
