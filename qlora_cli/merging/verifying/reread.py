"""Compare the files with the plan: names, dtypes and shapes, and the values of tensors outside the model."""

from collections.abc import Iterator
from pathlib import Path

import torch

from qlora_cli.merging.merge_result import Action
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.planning.merge_plan import MergePlan, PlannedTensor
from qlora_cli.merging.planning.stored_tensors import StoredTensors
from qlora_cli.model_files.checkpoint import TensorHeader, read_checkpoint
from qlora_cli.model_files.pickles import NAMES

PIECE_BYTES = 1024**2


def differing_files(directory: Path, inputs: Inputs, plan: MergePlan) -> Iterator[str]:
    """Yield the names of tensors in `directory` that are missing, unexpected, or not as in `plan`.

    For tensors of parameters only dtype and shape are compared: their values are compared when the model runs.
    """
    checkpoint = read_checkpoint(directory, allow_pickle=False)
    written, planned = checkpoint.tensors, {tensor.name: tensor for tensor in plan.tensors}
    yield from sorted(written.keys() ^ planned.keys())
    tensors = StoredTensors(directory, checkpoint)
    for name in sorted(written.keys() & planned.keys()):
        if not _is_as_planned(directory, written[name], planned[name], inputs, tensors):
            yield name


def _is_as_planned(
    directory: Path, header: TensorHeader, planned: PlannedTensor, inputs: Inputs, tensors: StoredTensors
) -> bool:
    dtype = planned.header.dtype if planned.action == Action.COPY else NAMES[planned.dtype]
    if (header.dtype, tuple(header.shape)) != (dtype, tuple(planned.shape)):
        return False
    return planned.group is not None or _is_unchanged(directory, header, planned, inputs, tensors)


def _is_unchanged(
    directory: Path, header: TensorHeader, planned: PlannedTensor, inputs: Inputs, tensors: StoredTensors
) -> bool:
    if planned.action == Action.COPY:
        return _are_same_bytes(
            inputs.source.path / planned.header.file, planned.header, directory / header.file, header
        )
    return is_same(tensors[header.name], inputs.base.tensors[planned.header.name].to(planned.dtype))


def _are_same_bytes(file: Path, header: TensorHeader, other_file: Path, other: TensorHeader) -> bool:
    """Return whether two tensors have the same bytes, also in a dtype that torch does not know."""
    with file.open("rb") as one, other_file.open("rb") as two:
        one.seek(header.offset)
        two.seek(other.offset)
        left = header.num_bytes
        while left > 0:
            size = min(left, PIECE_BYTES)
            if one.read(size) != two.read(size):
                return False
            left -= size
    return True


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are bitwise equal: a negative zero differs from zero."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
