"""What an adapter does to a parameter: the updates that PEFT adds while a model runs, as changes of its weight.

All of it is computed in fp32, from whatever an adapter was saved in.
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
        """Return what `weight`, in fp32, becomes; `weight` itself may be written to."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The adapter's own values."""

    def equals(self, other: "WeightChange") -> bool:
        """Whether it does the same to a weight as another change does."""
        if type(self) is not type(other) or _settings_of(self) != _settings_of(other):
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(torch.equal(one, two) for one, two in pairs)


def _settings_of(change: WeightChange) -> dict[str, object]:
    return {name: value for name, value in vars(change).items() if not isinstance(value, torch.Tensor)}


class Update(WeightChange):
    """A change that adds the same to whatever the weight is."""

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added: one of the factors is zero, as it is before training."""
        return not all(tensor.any() for tensor in self.tensors)

    @abstractmethod
    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return what is added, in fp32 and in the shape of the parameter or slice; in `buffer`, if it is given."""

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the weight with the update."""
        return weight.add_(self.delta(index))


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankUpdate(Update):
    """LoRA (arXiv 2106.09685, section 4.1): `scale * left @ right`, `(out, rank)` and `(rank, in)`.

    `is_transposed`: the weight is stored as `(in, out)`, as in GPT-2's Conv1D and in embeddings.
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
        """The factors of what is added to the weight as it is stored."""
        return (self.right.T, self.left.T) if self.is_transposed else (self.left, self.right)

    def equals(self, other: WeightChange) -> bool:
        """Whether it does the same to a weight; embedding and head hold it each the other way round."""
        if not isinstance(other, LowRankUpdate) or self.scale != other.scale:
            return False
        return all(torch.equal(one, two) for one, two in zip(self._sides, other._sides, strict=True))

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the product of the factors, scaled."""
        assert index is None, "a matrix has no slices"
        return _product(self.left, self.right, self.scale, buffer, flips=self.is_transposed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts(Update):
    """LoRA on the stacked weights of experts: a pair of factors for each, which PEFT keeps in two matrices.

    `left` is `(out, rank * num_experts)`, the ranks of one column apart; `right` is `(num_experts * rank, in)`.
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
        return _product(left, right, self.scale, buffer, flips=self.is_transposed)


def _product(
    left: torch.Tensor, right: torch.Tensor, scale: float, buffer: Buffer | None, *, flips: bool
) -> torch.Tensor:
    """Return `scale * left @ right` in fp32, or its transpose, which is computed as such and not copied."""
    one, other = (right.T, left.T) if flips else (left, right)
    out = None if buffer is None else buffer.lend((one.shape[0], other.shape[1]), torch.float32)
    return torch.mm(one.float(), other.float(), out=out).mul_(scale)


@dataclass(frozen=True, kw_only=True, eq=False)
class Added(Update):
    """A vector that is added: the bias of a LoRA layer (`lora_bias`), scaled."""

    values: torch.Tensor
    scale: float

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The vector."""
        return (self.values,)

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return the vector, scaled."""
        del buffer  # it is small
        assert index is None, "a vector has no slices"
        return self.values.float() * self.scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Directed(WeightChange):
    """DoRA (arXiv 2402.09353, section 4): the weight with its update, each row scaled to a magnitude that was trained.

    `magnitude` is `(out,)`; of an embedding, whose rows are tokens, it is that of its columns.
    """

    update: LowRankUpdate
    magnitude: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The two factors and the magnitudes."""
        return *self.update.tensors, self.magnitude

    def equals(self, other: WeightChange) -> bool:
        """Whether it does the same to a weight."""
        return (
            isinstance(other, Directed)
            and self.update.equals(other.update)
            and torch.equal(self.magnitude, other.magnitude)
        )

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the weight in its new directions and magnitudes."""
        moved = self.update.apply(weight, index)
        dim = 0 if self.update.is_transposed else 1
        factor = self.magnitude.float() / torch.linalg.norm(moved, dim=dim)
        return moved.mul_(factor.unsqueeze(dim))


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole(WeightChange):
    """A parameter that was trained as a whole, and takes the place of the one that was there."""

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
class Replaced(WeightChange):
    """An embedding or head that was saved with an adapter and replaces that of the base, with its `change`."""

    values: torch.Tensor
    change: WeightChange

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The values, and those of the change."""
        return self.values, *self.change.tensors

    def equals(self, other: WeightChange) -> bool:
        """Whether it does the same to a weight."""
        return (
            isinstance(other, Replaced) and torch.equal(self.values, other.values) and self.change.equals(other.change)
        )

    def apply(self, weight: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Return the values with the change."""
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
class Weighted:
    """A change as much as it counts: with 1, all of it."""

    change: WeightChange
    weight: float = 1.0

    @property
    def is_update(self) -> bool:
        """Whether it adds the same to whatever the weight is."""
        return isinstance(self.change, Update)

    def delta(self, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        """Return what is added."""
        assert isinstance(self.change, Update), "only an update adds the same to every weight"
        delta = self.change.delta(index, buffer)
        return delta if self.weight == 1 else delta.mul_(self.weight)


def total_delta(
    changes: Sequence[Weighted], index: int | None = None, buffer: Buffer | None = None
) -> torch.Tensor | None:
    """Return the sum of `changes`, all of them updates, in `buffer` if it is given; None if nothing is added."""
    changes = [one for one in changes if not (isinstance(one.change, Update) and one.change.is_zero)]
    if not changes:
        return None
    total = changes[0].delta(index, buffer)
    for other in changes[1:]:
        total = total.add_(other.delta(index))
    return total
