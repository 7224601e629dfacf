"""Check that a pickle of weights can be read, before anything waits for it. No code of it runs, no tensor is read."""

import pickle
import re
import zipfile
from pathlib import Path

import torch

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import again

NOT_ALLOWED = re.compile(r"Unsupported global: GLOBAL (\S+)")


def check_pickle(path: Path) -> None:
    """Check that `path` holds tensors by name, and nothing else.

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


def _reason(path: Path, error: Exception) -> str:
    # PyTorch's own words go on to advise that the file be allowed to run code.
    if match := NOT_ALLOWED.search(str(error)):
        return f"it holds {match[1]}, which is no tensor"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.stat().st_size == 0:
        return "it is empty"
    return "it is cut off, or no file of PyTorch"
