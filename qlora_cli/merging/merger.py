"""Compute merged tensors: one at a time, in fp32, cast once."""

from collections.abc import Sequence

import torch

from qlora_cli.errors import ModelError
from qlora_cli.merging.planning.base_weights import Base, BaseModel
from qlora_cli.merging.planning.buffer import Buffer
from qlora_cli.merging.planning.merge_plan import PlannedTensor
from qlora_cli.merging.planning.weight_changes import RowUpdate, WeightedChange, WholeParameter, total_delta
from qlora_cli.model_files.finite import is_finite

PIECE_SIZE = 256 * 1024  # weights that are added and cast at a time, so that they stay in the CPU cache


class Merger:
    """Computes the tensors of a plan. A value is valid until the second one after it is requested."""

    def __init__(self, model: BaseModel, base: Base) -> None:
        self._model = model
        self._base = base
        # While one tensor is written, the next one is computed.
        self._buffer, self._other_buffer, self._delta_buffer = Buffer(), Buffer(), Buffer()

    @torch.no_grad()
    def value(self, planned: PlannedTensor) -> torch.Tensor:
        """Return the values of a tensor to write.

        Raises:
            ModelError: it would hold NaN or infinite values.
        """
        self._buffer, self._other_buffer = self._other_buffer, self._buffer
        if planned.group is None:
            value = cast(self._model.tensors.read(planned.header.name, self._buffer), planned.dtype)
        elif planned.group.converter is None:
            target = planned.group.targets[0]
            (weight,) = self._base.parameters(planned.group, buffer=self._buffer).values()
            value = merged(weight, planned.changes.get(target, ()), planned.dtype, buffer=self._delta_buffer)
        else:
            value = cast(self._converted(planned), planned.dtype)
        if value.is_floating_point() and not is_finite(value):
            raise _not_finite(planned)
        return value.reshape(planned.shape)

    def _converted(self, planned: PlannedTensor) -> torch.Tensor:
        """Return a tensor that is converted to parameters with others: convert them, merge, and convert back."""
        group = planned.group
        assert group is not None, "it belongs to a parameter"
        made = self._base.parameters(group, planned.index)
        for target, changes in planned.changes.items():
            made[target] = merged(made[target], changes, torch.float32, planned.index)
        return group.backward(self._model.model, made, planned.index)[planned.header.name]


def merged(
    weight: torch.Tensor,
    changes: Sequence[WeightedChange],
    dtype: torch.dtype,
    index: int | None = None,
    buffer: Buffer | None = None,
) -> torch.Tensor:
    """Return `weight`, or the slice `index` of one, with `changes` applied in fp32, cast once to `dtype`.

    `weight` may be overwritten; the update is computed in `buffer`, if given.
    """
    if not changes:
        return cast(weight, dtype)
    if not all(one.is_update for one in changes):
        assert len(changes) == 1, "refused when the changes were combined"
        change = changes[0].change
        if isinstance(change, WholeParameter) and index is None:
            return cast(change.values, dtype)
        if isinstance(change, RowUpdate):
            result = cast(weight, dtype)
            result[torch.tensor(change.indices)] = change.values.to(dtype)
            return result
        return cast(change.apply(weight.to(torch.float32, copy=True), index), dtype)
    if weight.dim() < 3 or index is not None:
        return _added(weight, total_delta(changes, index, buffer), dtype)
    experts = torch.empty(weight.shape, dtype=dtype)
    for expert in range(len(weight)):
        piece = slice(expert, expert + 1)
        experts[piece] = _added(weight[piece], total_delta(changes, expert, buffer), dtype)
    return experts


def _added(weight: torch.Tensor, delta: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum, cast once; a weight without a delta keeps its bits, including those of a negative zero.

    If the result has the dtype of `weight`, which is not shared, `weight` is overwritten.
    """
    if delta is None:
        return cast(weight, dtype)
    result = weight if weight.dtype == dtype and weight.is_contiguous() else torch.empty(weight.shape, dtype=dtype)
    pieces = zip(*(torch.split(tensor.reshape(-1), PIECE_SIZE) for tensor in (result, weight, delta)), strict=True)
    for into, one, other in pieces:
        into.copy_(one.float() + other)
    return result


def cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight` in `dtype`, without a copy if it has that dtype."""
    return weight.to(dtype)


def _not_finite(planned: PlannedTensor) -> ModelError:
    name = f"{planned.name} (in {planned.file})"
    if planned.dtype == torch.float16:
        return ModelError(
            f"{name} overflows fp16: it would hold infinite values", hint="Use --dtype bf16 or --dtype fp32."
        )
    return ModelError(
        f"{name} would hold NaN or infinite values",
        hint="Does the adapter hold huge values? Use an earlier checkpoint.",
    )
