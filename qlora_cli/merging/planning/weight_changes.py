"""Changes of a parameter by an adapter: the updates that PEFT adds in the forward pass, applied to the weight.

They are computed in fp32, whatever dtype the adapter was saved in.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_cli.merging.planning.buffer import Buffer


class WeightChange(ABC):
    """One adapter's change of one parameter, or of the slice `index` of its first dimension."""

    @abstractmethod
    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the changed `weight`, in fp32; `weight` itself may be overwritten."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The adapter's own values."""

    def equals(self, other: "WeightChange") -> bool:
        """Return whether it changes a weight in the same way as another change."""
        if type(self) is not type(other) or _settings_of(self) != _settings_of(other):
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(torch.equal(one, two) for one, two in pairs)


def _settings_of(change: WeightChange) -> dict[str, object]:
    return {name: value for name, value in vars(change).items() if not isinstance(value, torch.Tensor)}


class Update(WeightChange):
    """A change that adds the same delta to any weight."""

    @property
    def is_zero(self) -> bool:
        """Whether the delta is zero, since a factor is, as before training."""
        return not all(tensor.any() for tensor in self.tensors)

    @abstractmethod
    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the delta in fp32, in the shape of the parameter or slice, and in `buffer` if given."""

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the weight with the delta added."""
        return weight.add_(self.delta(index))


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankUpdate(Update):
    """LoRA (arXiv 2106.09685, section 4.1): `scale * left @ right`, `(out, rank)` and `(rank, in)`.

    With `is_transposed` the weight is stored as `(in, out)`, as in GPT-2's Conv1D and in embeddings.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    is_transposed: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The two factors."""
        return self.left, self.right

    @property
    def _sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the delta in the layout of the stored weight."""
        return (self.right.T, self.left.T) if self.is_transposed else (self.left, self.right)

    def equals(self, other: WeightChange) -> bool:
        """Return whether it is the same update; embedding and head store the factors transposed to each other."""
        if not isinstance(other, LowRankUpdate) or self.scale != other.scale:
            return False
        return all(torch.equal(one, two) for one, two in zip(self._sides, other._sides, strict=True))

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the scaled product of the factors."""
        assert index is None, "a matrix has no slices"
        return _product(self.left, self.right, self.scale, buffer, is_transposed=self.is_transposed)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertUpdate(Update):
    """LoRA on the stacked weights of experts: a pair of factors for each, which PEFT stores in two matrices.

    `left` is `(out, rank * num_experts)` with the expert as the faster index; `right` is `(num_experts * rank, in)`.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    num_experts: int
    is_transposed: bool

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The two matrices."""
        return self.left, self.right

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the update of all experts, `(num_experts, …, …)`, or of one as `(1, …, …)`."""
        if index is not None:
            return self._of(index, buffer).unsqueeze(0)
        return torch.stack([self._of(expert, None) for expert in range(self.num_experts)])

    def _of(self, expert: int, buffer: Buffer | None) -> torch.Tensor:
        left = self.left.view(self.left.shape[0], -1, self.num_experts)[:, :, expert]
        right = self.right.view(self.num_experts, -1, self.right.shape[1])[expert]
        return _product(left, right, self.scale, buffer, is_transposed=self.is_transposed)


def _product(
    left: torch.Tensor, right: torch.Tensor, scale: float, buffer: Buffer | None, *, is_transposed: bool
) -> torch.Tensor:
    """Return `scale * left @ right` in fp32, or its transpose, computed directly without a copy."""
    one, other = (right.T, left.T) if is_transposed else (left, right)
    out = None if buffer is None else buffer.lend((one.shape[0], other.shape[1]), torch.float32)
    return torch.mm(one.float(), other.float(), out=out).mul_(scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedVector(Update):
    """A scaled vector that is added: the bias of a LoRA layer (`lora_bias`)."""

    values: torch.Tensor
    scale: float

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The vector."""
        return (self.values,)

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the scaled vector."""
        del buffer  # it is small
        assert index is None, "a vector has no slices"
        return self.values.float() * self.scale


@dataclass(frozen=True, kw_only=True, eq=False)
class DoraChange(WeightChange):
    """DoRA (arXiv 2402.09353, section 4): the weight with its update, each row scaled to a trained magnitude.

    `magnitude` is `(out,)`; for an embedding, whose rows are tokens, it is that of the columns.
    """

    update: LowRankUpdate
    magnitude: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The two factors and the magnitudes."""
        return *self.update.tensors, self.magnitude

    def equals(self, other: WeightChange) -> bool:
        """Return whether it changes a weight in the same way."""
        return (
            isinstance(other, DoraChange)
            and self.update.equals(other.update)
            and torch.equal(self.magnitude, other.magnitude)
        )

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the weight with its update, scaled to the magnitudes."""
        moved = self.update.apply(weight, index)
        dim = 0 if self.update.is_transposed else 1
        factor = self.magnitude.float() / torch.linalg.norm(moved, dim=dim)
        return moved.mul_(factor.unsqueeze(dim))


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeParameter(WeightChange):
    """A parameter that was trained whole, and replaces that of the base."""

    values: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The new values."""
        return (self.values,)

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the new values."""
        del weight
        return self.values.float() if index is None else self.values[index : index + 1].float()


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplacedParameter(WeightChange):
    """An embedding or head that was saved with an adapter and replaces that of the base, with its `change`."""

    values: torch.Tensor
    change: WeightChange

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The values, and those of the change."""
        return self.values, *self.change.tensors

    def equals(self, other: WeightChange) -> bool:
        """Return whether it changes a weight in the same way."""
        return (
            isinstance(other, ReplacedParameter)
            and torch.equal(self.values, other.values)
            and self.change.equals(other.change)
        )

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the values with the change applied."""
        del weight
        return self.change.apply(self.values.to(torch.float32, copy=True), index)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowUpdate(WeightChange):
    """Rows of an embedding that were trained, such as those of new tokens."""

    indices: Sequence[int]
    values: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The rows."""
        return (self.values,)

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the weight with the new rows."""
        assert index is None, "an embedding has no slices"
        weight[torch.tensor(self.indices)] = self.values.float()
        return weight


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedChange:
    """A change with its weight in the sum."""

    change: WeightChange
    weight: float = 1.0

    @property
    def is_update(self) -> bool:
        """Whether the change is an update."""
        return isinstance(self.change, Update)

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the weighted delta."""
        assert isinstance(self.change, Update), "only an update has a delta"
        delta = self.change.delta(index, buffer)
        return delta if self.weight == 1 else delta.mul_(self.weight)


def total_delta(
    changes: Sequence[WeightedChange], index: int | None = None, buffer: Buffer | None = None
) -> torch.Tensor | None:
    """Return the sum of `changes`, all updates, in `buffer` if given; None if all are zero."""
    changes = [one for one in changes if not (isinstance(one.change, Update) and one.change.is_zero)]
    if not changes:
        return None
    total = changes[0].delta(index, buffer)
    for other in changes[1:]:
        total = total.add_(other.delta(index))
    return total
