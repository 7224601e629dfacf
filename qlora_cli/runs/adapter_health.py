"""What training made of an adapter: how large its updates are, and how much of its rank they use. Plain values."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_cli.units import Whole

LAYER_NUMBER = re.compile(r"\.(\d{1,6})\.")


@dataclass(frozen=True, kw_only=True)
class ModuleHealth:
    """The update U = scale · B A of one module.

    Attributes:
        name: The module's name in the base.
        rank: The rank of its matrices.
        update_norm: The Frobenius norm of U.
        weight_norm: That of the base's weight; None if it is not in memory as a whole.
        effective_rank: exp of the entropy of U's singular values, divided by their sum (Roy and Vetterli, The
            effective rank, EUSIPCO 2007): k for k equal directions, at most `rank`; 0 for no update.
        lost_share: The norm of what a merge into 16 bit rounds off U, as a share of the norm of U, over some rows of
            the weight; None if the weight is not in memory, or U is not simply added to it.
    """

    name: str
    rank: Whole
    update_norm: float
    weight_norm: float | None
    effective_rank: float
    lost_share: float | None

    @property
    def relative_norm(self) -> float | None:
        """The norm of the update as a share of that of the weight."""
        return self.update_norm / self.weight_norm if self.weight_norm else None

    @property
    def layer(self) -> int | None:
        """The number of the layer that the module is in; None for one that is in none."""
        found = LAYER_NUMBER.search(self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class AdapterHealth:
    """The updates of all modules.

    Attributes:
        rank: The largest rank.
        effective_rank: The mean over modules.
        relative_norm: The norm of all updates as a share of that of all their weights; None without these.
        lost_share: What a merge into `merge_dtype` rounds off, as a share of the norm of all updates.
        merge_dtype: The 16-bit dtype of a merge.
        num_unmeasured: Modules whose update is not a product of two matrices, such as stacked experts.
        modules: Each module.
    """

    rank: Whole
    effective_rank: float
    relative_norm: float | None
    lost_share: float | None
    merge_dtype: str
    num_unmeasured: Whole
    modules: tuple[ModuleHealth, ...]

    @classmethod
    def of_modules(
        cls, modules: Iterable[ModuleHealth], *, merge_dtype: str, num_unmeasured: int
    ) -> "AdapterHealth | None":
        """Return the figures of all modules; None if there are none."""
        measured = tuple(modules)
        if not measured:
            return None
        update = math.hypot(*(module.update_norm for module in measured))
        weights = [module.weight_norm for module in measured if module.weight_norm is not None]
        lost = [module.lost_share * module.update_norm for module in measured if module.lost_share is not None]
        return cls(
            rank=max(module.rank for module in measured),
            effective_rank=sum(module.effective_rank for module in measured) / len(measured),
            relative_norm=update / math.hypot(*weights) if len(weights) == len(measured) else None,
            lost_share=math.hypot(*lost) / update if len(lost) == len(measured) and update else None,
            merge_dtype=merge_dtype,
            num_unmeasured=num_unmeasured,
            modules=measured,
        )

    @property
    def sentence(self) -> str:
        """The figures in words, such as `rank 64 uses 11.3`."""
        parts = [f"rank {self.rank} uses {self.effective_rank:.1f}"]
        if self.relative_norm is not None:
            parts.append(f"the update is {self.relative_norm:.2%} of the weights")
        if self.lost_share is not None:
            parts.append(f"a merge into {self.merge_dtype} rounds off {self.lost_share:.1%} of it")
        return "; ".join(parts)
