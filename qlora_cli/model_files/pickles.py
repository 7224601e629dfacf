"""Check that a pickle of weights can be read, before anything waits for it. No code of it runs, no tensor is read."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import TensorHeader, again

# As the headers of safetensors name them.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NOT_ALLOWED = re.compile(r"Unsupported global: GLOBAL (\S+)")


def header_of(name: str, tensor: torch.Tensor, file: str) -> TensorHeader:
    """Return the tensor `name` as `file` would announce it if it were in safetensors."""
    return TensorHeader(
        name=name, file=file, dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape), num_bytes=tensor.nbytes
    )


def check_pickle(path: Path) -> dict[str, TensorHeader]:
    """Check that `path` holds tensors by name, and nothing else; return them.

    A file from before PyTorch 1.6 has to be read as a whole for that.

    Raises:
        ModelError: it does not, or is damaged; names the file.
    """
    try:
        found = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path} can't be read: {_reason(path, error)}", hint=again(path.parent, path.name)
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{path} can't be read: it holds a {type(found).__name__}, not tensors by name",
            hint=again(path.parent, path.name),
        )
    if others := [key for key in found if not isinstance(key, str)]:
        raise ModelError(
            f"{path} can't be read: its key {others[0]!r} is no name of a tensor", hint=again(path.parent, path.name)
        )
    return {
        name: header_of(name, value, path.name)
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and value.dtype in NAMES
    }


def _reason(path: Path, error: Exception) -> str:
    # PyTorch's own message advises that the file be allowed to run code.
    if match := NOT_ALLOWED.search(str(error)):
        return f"it holds {match[1]}, which is no tensor"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.stat().st_size == 0:
        return "it is empty"
    return "it is cut off, or no file of PyTorch"
