"""The memory that a run on a GPU takes from the host: what is known of it, and a guess. Imports no torch."""

from dataclasses import replace

from qlora_cli.memory.costs.run_files import FileSizes
from qlora_cli.memory.prediction import HostMemory, RunFigures
from qlora_cli.units import GIB

# Python, PyTorch and the other libraries with a CUDA context: a guess, and the ends of its band.
PROCESS_BYTES, PROCESS_LOW_BYTES, PROCESS_HIGH_BYTES = 2 * GIB, 1 * GIB, 4 * GIB
READING_HIGH_BYTES = 3 * GIB // 2  # what loading takes at most, as `tests/integration/loading` holds
ROW_BYTES = 100  # lengths, digests and places of a row; its tokens stay on the disk
PINNED_ROUNDING = 2  # PyTorch rounds pinned memory up to powers of two
PROCESSES_OF_HOST = 8  # at most, as machines are sold


def host_memory(
    *,
    largest_weight_bytes: int,
    embedding_bytes: int,
    shard_bytes: int = 0,
    pinned_bytes: int,
    paged_bytes: int,
    files: FileSizes,
    num_rows: int,
    num_processes: int = 1,
) -> HostMemory:
    """Return the parts of a host's memory for each of `num_processes`, as many of which as possible it has.

    Weights are read one at a time, of at most `largest_weight_bytes`; `embedding_bytes` and
    `shard_bytes` of the base stay on the host. A checkpoint is copied to the host before it is written.
    """
    return HostMemory(
        process_bytes=PROCESS_BYTES,
        embedding_bytes=embedding_bytes,
        shard_bytes=shard_bytes,
        rows_bytes=ROW_BYTES * num_rows,
        reading_bytes=largest_weight_bytes,
        pinned_bytes=pinned_bytes,
        saving_bytes=files.adapter_bytes + files.optimizer_bytes,
        paged_bytes=paged_bytes,
        num_processes=min(num_processes, PROCESSES_OF_HOST),
    )


def with_host(figures: RunFigures, host: HostMemory) -> RunFigures:
    """Return `figures` with the host's memory at the peak of the run, which is while it loads or while it trains.

    It is that of all processes on a host, which load at the same time. The upper end counts all of the paged optimizer
    state, which is on the host only where the GPU is full.
    """
    resident, number = host.embedding_bytes + host.shard_bytes + host.rows_bytes, host.num_processes
    training = number * host.pinned_bytes + host.saving_bytes
    training_high = number * (PINNED_ROUNDING * host.pinned_bytes + host.paged_bytes) + host.saving_bytes
    reading, reading_high = number * host.reading_bytes, number * max(host.reading_bytes, READING_HIGH_BYTES)
    return replace(
        figures,
        host_bytes=number * (host.process_bytes + resident) + max(reading, training),
        host_bytes_low=number * (PROCESS_LOW_BYTES + resident + max(host.reading_bytes, host.pinned_bytes)),
        host_bytes_high=number * (PROCESS_HIGH_BYTES + resident) + max(reading_high, training_high),
    )
