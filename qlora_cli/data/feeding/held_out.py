"""Choose the rows to hold out of training at random, in groups that must not be divided."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qlora_cli.data.feeding.token_table import Mask, Numbers, TokenTable
from qlora_cli.data.rows.groups import NO_GROUP


@dataclass(frozen=True, kw_only=True)
class HeldOutDigests:
    """Digests of held-out rows: of their truncated tokens, of their groups, and of their texts with counts."""

    rows: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    texts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, table: TokenTable, indices: Numbers) -> "HeldOutDigests":
        """Return the digests of the rows at `indices`."""
        rows, groups = (frozenset(column[indices].tolist()) for column in (table.truncated_digest, table.group))
        return cls(rows=rows, groups=groups - {NO_GROUP}, texts=Counter(table.text_digest[indices].tolist()))

    def contains(self, truncated_digest: int, group: int) -> bool:
        """Return whether a row is held out, equal to a held-out one, or of its group."""
        return truncated_digest in self.rows or group in self.groups

    def mask_in(self, table: TokenTable) -> Mask:
        """Return the mask of rows of `table` that are held out, equal to a held-out one, or of its group."""
        return np.isin(table.truncated_digest, _array(self.rows)) | np.isin(table.group, _array(self.groups))


def hold_out(unit: Numbers, num_rows: int, seed: int) -> Mask:
    """Return the mask of about `num_rows` random rows to hold out; rows of the same `unit` stay together.

    A unit is taken if that brings the number of rows nearer to `num_rows`; if none does, one of the smallest is taken.
    One unit is always left, so nothing is held out if there is only one.
    """
    _, unit_index, sizes = np.unique(unit, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    is_taken = np.zeros(len(sizes), dtype=bool)
    num_spare, num_missing = len(sizes) - 1, num_rows
    for index in order:
        if num_missing <= 0 or not num_spare:
            break
        if sizes[index] < 2 * num_missing:
            is_taken[index] = True
            num_missing -= int(sizes[index])
            num_spare -= 1
    if not is_taken.any() and num_spare:
        is_taken[order[np.argmin(sizes[order])]] = True
    return is_taken[unit_index]


def _array(digests: frozenset[int]) -> Numbers:
    return np.fromiter(digests, np.int64, len(digests))
