"""Which rows are held out of training: by chance, as a whole with all that they must not be parted from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qlora_cli.data.feeding.token_table import Mask, Numbers, Table
from qlora_cli.data.rows.groups import NO_GROUP


@dataclass(frozen=True, kw_only=True)
class HeldOutChoice:
    """Digests of rows that are held out: of what is kept of them, of their groups, and of texts with their number."""

    rows: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    texts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table, places: Numbers) -> "HeldOutChoice":
        """Return the digests of the rows at `places`."""
        rows, groups = (frozenset(column[places].tolist()) for column in (table.kept_digest, table.group))
        return cls(rows=rows, groups=groups - {NO_GROUP}, texts=Counter(table.text_digest[places].tolist()))

    def has(self, kept_digest: int, group: int) -> bool:
        """Whether a row is held out, or equal to one that is, or of its group."""
        return kept_digest in self.rows or group in self.groups

    def among(self, table: Table) -> Mask:
        """Return which rows of `table` are held out in this sense."""
        return np.isin(table.kept_digest, _array(self.rows)) | np.isin(table.group, _array(self.groups))


def hold_out(unit: Numbers, num_rows: int, seed: int) -> Mask:
    """Return which rows are held out: about `num_rows` by chance, those with the same `unit` always together.

    A unit is taken if that brings their number nearer to what is wanted; if none would, one of the smallest is. One
    is always left, so that nothing is held out where there is only one.
    """
    _, place, sizes = np.unique(unit, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    taken = np.zeros(len(sizes), dtype=bool)
    num_left, left = len(sizes) - 1, num_rows
    for each in order:
        if left <= 0 or not num_left:
            break
        if sizes[each] < 2 * left:
            taken[each] = True
            left -= int(sizes[each])
            num_left -= 1
    if not taken.any() and num_left:
        taken[order[np.argmin(sizes[order])]] = True
    return taken[place]


def _array(digests: frozenset[int]) -> Numbers:
    return np.fromiter(digests, np.int64, len(digests))
