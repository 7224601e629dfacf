"""Compare a LoRA in GGUF with the adapter that it was converted from: every module, its factors and its scale.

Only this module and `gguf_file` need the package `gguf`: import it only after checking that it is installed.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, TensorNameMap
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from qlora_cli.errors import ExportError
from qlora_cli.merging.exports.llama_cpp.converter import UPDATE
from qlora_cli.merging.exports.llama_cpp.gguf_file import UNREADABLE
from qlora_cli.units import counted

SCALE_TOLERANCE = 1e-6  # relative: alpha is stored in fp32
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]


def lora_mismatches(file: Path, factors: Factors) -> list[str]:
    """Describe where `file` differs from an adapter with these `factors`: A, B and the scale, by the module.

    Rows may be in another order, as in the queries and keys of a Llama; values and the order of ranks are exact.

    Raises:
        ExportError: it is not a GGUF file.
    """
    try:
        reader = GGUFReader(file)
        alpha = float(_text(reader, "adapter.lora.alpha"))
        architecture = _text(reader, "general.architecture")
        found = {str(tensor.name): np.asarray(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    except UNREADABLE as error:
        raise ExportError(
            f"what llama.cpp's converter wrote to {file.name} can't be read as GGUF: {error}",
            hint=f"Is the disk full? Otherwise: {UPDATE}.",
        ) from error
    problems = []
    names = _names(architecture, factors)
    for module, (right, left, scale) in factors.items():
        a, b = (found.pop(f"{names.get(module)}.weight.lora_{one}", None) for one in "ab")
        if a is None or b is None:
            problems.append(f"{module} is not in it")
        elif not _is_same(a, b, right, left):
            problems.append(f"{module} has other values in it")
        elif abs(alpha / right.shape[0] - scale) > SCALE_TOLERANCE * abs(scale):
            problems.append(f"{module} is scaled by {alpha / right.shape[0]:g}, not by {scale:g}")
    if found:
        problems.append(f"it holds {counted(len(found), 'tensor')} more, such as {min(found)}")
    return problems[:3]


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"it has no {key}")
    return str(field.contents())


def _names(architecture: str, factors: Factors) -> Mapping[str, str]:
    """Return llama.cpp's name of each module."""
    known = next((kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == architecture), None)
    if known is None:
        return {}
    most = 1 + max((int(part) for module in factors for part in module.split(".") if part.isdigit()), default=0)
    table = TensorNameMap(known, most)
    return {module: name for module in factors if (name := table.get_name(module)) is not None}


def _is_same(a: np.ndarray, b: np.ndarray, right: torch.Tensor, left: torch.Tensor) -> bool:
    """Return whether the factors are those of the adapter, but for the order of B's rows."""
    if a.shape != tuple(right.shape) or b.shape != tuple(left.shape):
        return False
    return np.array_equal(a, right.numpy()) and np.array_equal(_sorted_rows(b), _sorted_rows(left.numpy()))


def _sorted_rows(values: np.ndarray) -> np.ndarray:
    return values[np.lexsort(values.T)]
