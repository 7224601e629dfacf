"""Fill rows up to a length with several short ones, of which none sees another."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from qlora_cli.data.feeding.token_table import Numbers


def best_fit(lengths: Numbers, capacity: int) -> list[list[int]]:
    """Return which rows share a packed row: longest first, each into the fullest one that has room for it.

    Best-fit decreasing needs at most 11/9 of the fewest bins, and one more (D. S. Johnson, 1973).
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # the different rooms that are left, rising
    by_space: defaultdict[int, list[list[int]]] = defaultdict(list)
    for row in np.argsort(-lengths, kind="stable"):
        length = int(lengths[row])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            space = capacity
            bins.append([])
            found = bins[-1]
        else:
            space = spaces[place]
            found = by_space[space].pop()
            if not by_space[space]:
                spaces.pop(place)
        found.append(int(row))
        left = space - length
        if left > 0:
            if not by_space[left]:
                insort(spaces, left)
            by_space[left].append(found)
    return bins


def pack(dataset: Dataset, bins: Sequence[Sequence[int]]) -> Dataset:
    """Return a data set of packed rows, put together when they are read.

    Each has `input_ids` and `labels`, both `(seq,)`, and `seq_lengths`, the lengths of the rows that it holds, from
    which the collator numbers the positions of each row from 0.
    """
    tokens = dataset.select_columns(["input_ids", "labels"])

    def put_together(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        packed: dict[str, list[Any]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for rows in batch["rows"]:
            found = tokens[list(rows)]
            packed["input_ids"].append([token for ids in found["input_ids"] for token in ids])
            packed["labels"].append([label for labels in found["labels"] for label in labels])
            packed["seq_lengths"].append([len(ids) for ids in found["input_ids"]])
        return packed

    return Dataset.from_dict({"rows": [list(rows) for rows in bins]}).with_transform(put_together)
