"""A table of the tokenized rows of one or several data sets, with per-row numbers as arrays."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from qlora_cli.data.rows.groups import NO_GROUP
from qlora_cli.data.tokenizing.store import UNLABELLED, StoredTokens, TokenizedDataset

Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class TokenTable:
    """The concatenated rows of several data sets. Every array is int64 `(rows,)`."""

    def __init__(self, parts: Sequence[StoredTokens]) -> None:
        self._parts = tuple(parts)
        self.dataset: Dataset = concatenate_datasets([part.dataset for part in parts])
        self._offsets = np.cumsum([0, *(len(part.dataset) for part in parts)])

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def datasets(self) -> tuple[TokenizedDataset, ...]:
        """The description of each data set."""
        return tuple(part.about for part in self._parts)

    @property
    def skipped(self) -> tuple[Path, ...]:
        """The files that list rows that could not be used."""
        return tuple(part.skipped for part in self._parts if part.skipped is not None)

    @cached_property
    def length(self) -> Numbers:
        """The number of tokens of each row before truncation."""
        return self._column("length")

    @cached_property
    def longest(self) -> Numbers:
        """The number of tokens of the longest sequence of each row before truncation."""
        return self._column("longest")

    @cached_property
    def first(self) -> Numbers:
        """The number of tokens of the first sequence of each row that is a pair; 0 of others."""
        return self._column("first")

    @cached_property
    def desirable(self) -> Numbers:
        """Whether the answer of each row is wanted, 1 or 0, by its label; `UNLABELLED` of others."""
        return self._column("desirable")

    @property
    def has_labels(self) -> bool:
        """Whether answers have labels; all of them have, or none."""
        return bool((self.desirable != UNLABELLED).any())

    @cached_property
    def fed(self) -> Numbers:
        """The number of tokens of each row after truncation."""
        chunks = self.dataset.data.column("input_ids").chunks
        lengths: Numbers = np.concatenate(
            [np.empty(0, np.int64), *(each.value_lengths().to_numpy() for each in chunks)]
        )
        return lengths

    @property
    def longest_fed(self) -> Numbers:
        """The number of tokens of the longest sequence of each row after truncation."""
        longest: Numbers = np.maximum(self.first, self.fed - self.first)
        return longest

    @property
    def has_pairs(self) -> bool:
        """Whether rows are pairs; all of them are, or none."""
        return bool(self.first.any())

    @cached_property
    def trained(self) -> Numbers:
        """The number of trained tokens of each row after truncation."""
        return self._column("trained")

    @cached_property
    def lost(self) -> Numbers:
        """The number of tokens of each row that would be trained, but are truncated."""
        return self._column("lost")

    @cached_property
    def digest(self) -> Numbers:
        """A digest of each row before truncation."""
        return self._column("digest")

    @cached_property
    def truncated_digest(self) -> Numbers:
        """A digest of each row after truncation."""
        return self._column("truncated_digest")

    @cached_property
    def group(self) -> Numbers:
        """A digest of each row's group; `NO_GROUP` if it has none."""
        return self._column("group")

    @cached_property
    def holdout_key(self) -> Numbers:
        """A digest that rows held out together share: that of the group, or else of the truncated row."""
        return np.where(self.group == NO_GROUP, self.truncated_digest, self.group)

    @cached_property
    def text_digest(self) -> Numbers:
        """A digest of each row's text, equal for texts that differ only in case, punctuation and spaces."""
        return self._column("text_digest")

    @cached_property
    def source(self) -> Numbers:
        """The index of the data set that each row comes from."""
        return np.repeat(np.arange(len(self._parts)), np.diff(self._offsets))

    def where(self, row: int) -> str:
        """Return the file and number of a row, for a message."""
        stored = self.dataset[int(row)]
        dataset = self._parts[int(self.source[row])].about
        return f"{dataset.files[stored['file']]}, row {stored['number']}"

    def _column(self, name: str) -> Numbers:
        chunks = self.dataset.data.column(name).chunks
        return np.concatenate([np.empty(0, np.int64), *(chunk.to_numpy() for chunk in chunks)])


def first_occurrences(digest: Numbers) -> Mask:
    """Return the mask of rows that are the first with their digest."""
    is_first = np.zeros(len(digest), dtype=bool)
    is_first[np.unique(digest, return_index=True)[1]] = True
    return is_first
