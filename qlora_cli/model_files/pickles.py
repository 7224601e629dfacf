"""Check that a pickle of weights can be read, without running its code or reading a tensor."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import TensorHeader, how_to_restore

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
    """Return the header that the tensor `name` would have if `file` were safetensors."""
    return TensorHeader(
        name=name, file=file, dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape), num_bytes=tensor.nbytes
    )


def check_pickle(path: Path) -> dict[str, TensorHeader]:
    """Check that `path` holds tensors by name, and nothing else; return their headers.

    A file from before PyTorch 1.6 has to be read whole for that.

    Raises:
        ModelError: it holds something else, or is damaged; names the file.
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path} can't be read: {_reason(path, error)}", hint=how_to_restore(path.parent, path.name)
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} can't be read: it holds a {type(content).__name__}, not tensors by name",
            hint=how_to_restore(path.parent, path.name),
        )
    if invalid := [key for key in content if not isinstance(key, str)]:
        raise ModelError(
            f"{path} can't be read: its key {invalid[0]!r} is not the name of a tensor",
            hint=how_to_restore(path.parent, path.name),
        )
    return {
        name: header_of(name, value, path.name)
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and value.dtype in NAMES
    }


def _reason(path: Path, error: Exception) -> str:
    # PyTorch's own message advises that the file be allowed to run code.
    if match := NOT_ALLOWED.search(str(error)):
        return f"it holds {match[1]}, which is not a tensor"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.stat().st_size == 0:
        return "it is empty"
    return "it is truncated, or not a PyTorch file"
