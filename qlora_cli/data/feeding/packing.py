"""Join several short rows into one of up to a maximum length, in which they do not attend to each other.

Packing joins rows of the whole data set, once; micro-batches are filled with the rows of one step.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from qlora_cli.data.feeding.token_table import Numbers


def best_fit(lengths: Numbers, capacity: int) -> list[list[int]]:
    """Return the rows of each packed row: longest first, each in the fullest one that it fits into.

    Best-fit decreasing needs at most 11/9 of the fewest bins, and one more (D. S. Johnson, 1973).
    """
    bins: list[list[int]] = []
    free_lengths: list[int] = []  # the distinct free lengths of bins, ascending
    by_free_length: defaultdict[int, list[list[int]]] = defaultdict(list)
    for row in np.argsort(-lengths, kind="stable"):
        length = int(lengths[row])
        position = bisect_left(free_lengths, length)
        if position == len(free_lengths):
            free = capacity
            bins.append([])
            target = bins[-1]
        else:
            free = free_lengths[position]
            target = by_free_length[free].pop()
            if not by_free_length[free]:
                free_lengths.pop(position)
        target.append(int(row))
        remaining = free - length
        if remaining > 0:
            if not by_free_length[remaining]:
                insort(free_lengths, remaining)
            by_free_length[remaining].append(target)
    return bins


def fill_micro_batches(lengths: Numbers, most_tokens: int) -> list[list[int]]:
    """Return the rows of each micro-batch of a step whose rows have these lengths, as positions in it.

    A micro-batch has at most `most_tokens` tokens, or one row that is longer. Its rows, and the micro-batches by their
    first rows, keep their order.
    """
    return sorted(sorted(rows) for rows in best_fit(lengths, most_tokens))


def pack(dataset: Dataset, bins: Sequence[Sequence[int]]) -> Dataset:
    """Return a data set of packed rows, which are joined when they are read.

    Each has `input_ids` and `labels`, both `(seq,)`, and `seq_lengths`, the lengths of the rows in it, by which
    the collator restarts positions at 0 for each of them.
    """
    tokens = dataset.select_columns(["input_ids", "labels"])

    def join_rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        packed: dict[str, list[Any]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for rows in batch["rows"]:
            members = tokens[list(rows)]
            packed["input_ids"].append([token for ids in members["input_ids"] for token in ids])
            packed["labels"].append([label for labels in members["labels"] for label in labels])
            packed["seq_lengths"].append([len(ids) for ids in members["input_ids"]])
        return packed

    return Dataset.from_dict({"rows": [list(rows) for rows in bins]}).with_transform(join_rows)
