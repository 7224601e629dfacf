"""The sizes of the files of a run: what it writes, and what it downloads. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import INDEX_SUFFIX, read_weight_map, weights_entry

SMALL_FILES_BYTES = 32 * 1024**2  # tokenizer, configs, trainer state, metrics
ADAPTER_VALUE_BYTES = 4
STORED_BYTES = {"float32": 4, "float64": 8}  # of a weight, by the dtype in the config; all others have 2


@dataclass(frozen=True, kw_only=True)
class FileSizes:
    """The sizes of the files of a run: its adapter, and in a checkpoint also the optimizer's state."""

    adapter_bytes: int
    optimizer_bytes: int

    @classmethod
    def of(cls, *, num_trained: int, frozen_bytes: int, state_bytes: int) -> "FileSizes":
        """Return the sizes for so many trained values, and untrained ones of the base in the adapter's file."""
        adapter_bytes = ADAPTER_VALUE_BYTES * num_trained + frozen_bytes
        return cls(adapter_bytes=adapter_bytes, optimizer_bytes=state_bytes)

    @property
    def checkpoint_bytes(self) -> int:
        """The size of one checkpoint."""
        return self.adapter_bytes + self.optimizer_bytes + SMALL_FILES_BYTES

    def disk_bytes(self, *, max_checkpoints: int, keeps_best: bool) -> int:
        """Return the largest size of a run directory; `keeps_best`: it evaluates, and keeps the best checkpoint, too.

        The newest checkpoint is complete before the oldest is deleted.
        """
        most_checkpoints = max_checkpoints + 1 + int(keeps_best)
        return self.adapter_bytes + SMALL_FILES_BYTES + most_checkpoints * self.checkpoint_bytes


def weights_bytes(config: Mapping[str, Any], num_parameters: int, quantized_bytes: int | None) -> int:
    """Return about the size of a model's weight files.

    `quantized_bytes` are those of its weights if the checkpoint is quantized; else each has the config's dtype.
    """
    if quantized_bytes is not None:
        return quantized_bytes
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    return num_parameters * STORED_BYTES.get(dtype.removeprefix("torch."), 2)


def has_weights(directory: Path | None) -> bool:
    """Return whether a directory has all weight files of a model."""
    names = {path.name for path in directory.iterdir()} if directory is not None else set()
    entry = weights_entry(names, allow_pickle=True)
    if directory is None or entry is None:
        return False
    if not entry.endswith(INDEX_SUFFIX):
        return True
    try:
        return set(read_weight_map(directory / entry).values()) <= names
    except ModelError:
        return False
