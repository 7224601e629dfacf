"""Rows of tokens from one or several data sets, and what can be computed on all of them at once by their numbers."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from qlora_cli.data.rows.groups import NO_GROUP
from qlora_cli.data.tokenizing.store import About, StoredTokens

Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Table:
    """The rows of several data sets one after the other. Every array is int64 `(rows,)`."""

    def __init__(self, parts: Sequence[StoredTokens]) -> None:
        self._parts = tuple(parts)
        self.dataset: Dataset = concatenate_datasets([part.dataset for part in parts])
        self._begins = np.cumsum([0, *(len(part.dataset) for part in parts)])

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def about(self) -> tuple[About, ...]:
        """What was recognised in each data set."""
        return tuple(part.about for part in self._parts)

    @property
    def skipped(self) -> tuple[Path, ...]:
        """The lists of rows that could not be used."""
        return tuple(part.skipped for part in self._parts if part.skipped is not None)

    @cached_property
    def length(self) -> Numbers:
        """Tokens of each whole row."""
        return self._column("length")

    @cached_property
    def supervised(self) -> Numbers:
        """Tokens of each row that are trained, of those that are kept."""
        return self._column("supervised")

    @cached_property
    def lost(self) -> Numbers:
        """Tokens of each row that would be trained, but lie beyond the longest length."""
        return self._column("lost")

    @cached_property
    def digest(self) -> Numbers:
        """64 bits that are equal for equal whole rows."""
        return self._column("digest")

    @cached_property
    def kept_digest(self) -> Numbers:
        """The same of what is kept of each row."""
        return self._column("kept_digest")

    @cached_property
    def group(self) -> Numbers:
        """A digest of the group that each row is held out with; `NO_GROUP` if it has none."""
        return self._column("group")

    @cached_property
    def unit(self) -> Numbers:
        """A digest of what each row is held out with: its group, or else the rows that are equal as far as kept."""
        return np.where(self.group == NO_GROUP, self.kept_digest, self.group)

    @cached_property
    def text_digest(self) -> Numbers:
        """64 bits that are equal for texts that differ in case, punctuation and spaces alone."""
        return self._column("text_digest")

    @cached_property
    def source(self) -> Numbers:
        """The place of the data set that each row comes from."""
        return np.repeat(np.arange(len(self._parts)), np.diff(self._begins))

    def where(self, row: int) -> str:
        """Return file and number of a row, for a message."""
        found = self.dataset[int(row)]
        about = self._parts[int(self.source[row])].about
        return f"{about.files[found['file']]}, row {found['number']}"

    def _column(self, name: str) -> Numbers:
        chunks = self.dataset.data.column(name).chunks
        return np.concatenate([np.empty(0, np.int64), *(chunk.to_numpy() for chunk in chunks)])


def first_of_each(digest: Numbers) -> Mask:
    """Return which rows are the first of their kind."""
    found = np.zeros(len(digest), dtype=bool)
    found[np.unique(digest, return_index=True)[1]] = True
    return found
