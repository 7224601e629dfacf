"""Answers to prompts that are not theirs, of which the baseline of KTO is a mean (arXiv 2402.01306, section 4.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_cli.data.rows.examples import IGNORE_INDEX

SEQUENCE = ("input_ids", "labels")


def start_of_answer(row: Mapping[str, Any]) -> int:
    """Return the place of the first trained token of a row."""
    return int(np.flatnonzero(np.asarray(row["labels"]) != IGNORE_INDEX)[0])


def with_answer_of(row: Mapping[str, Any], other: Mapping[str, Any], longest_tokens: int) -> dict[str, Any]:
    """Return the prompt of a row with the answer of another one, cut to `longest_tokens`."""
    start, start_of_other = start_of_answer(row), start_of_answer(other)
    return {name: [*row[name][:start], *other[name][start_of_other:]][:longest_tokens] for name in SEQUENCE}


def mismatched_rows(rows: Sequence[Mapping[str, Any]], longest_tokens: int) -> list[dict[str, Any]]:
    """Return the prompt of each row with the answer of the one before it, of the first with that of the last."""
    return [
        with_answer_of(row, other, longest_tokens) for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True)
    ]
