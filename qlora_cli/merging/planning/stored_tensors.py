"""Read the tensors of a checkpoint one at a time, so that no others are in memory."""

from io import RawIOBase
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.merging.planning.buffer import Buffer
from qlora_cli.model_files.checkpoint import SAFETENSORS, Checkpoint, TensorHeader
from qlora_cli.model_files.finite import DAMAGED
from qlora_cli.model_files.pickles import DTYPES, header_of


class StoredTensors:
    """Reads tensors by name from the files of a checkpoint."""

    def __init__(self, directory: Path, checkpoint: Checkpoint) -> None:
        self._directory = directory
        self._unpickled: dict[str, torch.Tensor] = {}
        for file in checkpoint.files if checkpoint.is_pickle else ():
            self._unpickled |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        self.is_pickle = checkpoint.is_pickle
        self.headers = dict(checkpoint.tensors) or {
            name: header_of(name, tensor, SAFETENSORS) for name, tensor in self._unpickled.items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor, which the caller may modify."""
        return self.read(name)

    def read(self, name: str, buffer: Buffer | None = None) -> torch.Tensor:
        """Return a tensor, which the caller may modify, in `buffer` if given."""
        if self._unpickled:
            return self._unpickled[name].clone(memory_format=torch.contiguous_format)
        header = self.headers[name]
        dtype = DTYPES[header.dtype]
        tensor = torch.empty(header.shape, dtype=dtype) if buffer is None else buffer.lend(header.shape, dtype)
        with (self._directory / header.file).open("rb", buffering=0) as file:
            file.seek(header.offset)
            fill(file, bytes_of(tensor))
        return tensor


def not_finite(header: TensorHeader) -> ModelError:
    """Return the error for a tensor of a base that holds NaN or infinity."""
    return ModelError(
        f"the base holds NaN or infinite values in {header.name} (in {header.file})",
        hint=DAMAGED,
    )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a view of the bytes of a contiguous tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def fill(file: RawIOBase, buffer: memoryview) -> None:
    """Read from `file` until `buffer` is full."""
    while len(buffer):
        num_read = file.readinto(buffer)
        if not num_read:
            raise OSError("the file ended within a tensor: it was changed while it was read")
        buffer = buffer[num_read:]
