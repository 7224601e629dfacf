"""A step's rows are divided into micro-batches of tokens: no row is cut, lost or repeated, and the order is kept."""

from functools import partial
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.feeding.micro_batches import micro_batch_tokens
from qlora_cli.data.feeding.packing import fill_micro_batches
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.training.batches import (
    NUM_MICRO_BATCHES,
    NUM_TRAINED,
    BatchCollator,
    StepCollator,
    micro_batches_of,
)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=64), most_tokens=st.integers(1, 300))
def test_every_row_is_in_one_micro_batch_and_only_a_longer_row_exceeds_it(
    lengths: list[int], most_tokens: int
) -> None:
    filled = fill_micro_batches(np.array(lengths), most_tokens)
    assert sorted(row for rows in filled for row in rows) == list(range(len(lengths)))
    for rows in filled:
        assert sum(lengths[row] for row in rows) <= most_tokens or len(rows) == 1
        assert rows == sorted(rows)
    assert [rows[0] for rows in filled] == sorted(rows[0] for rows in filled)
    assert filled == fill_micro_batches(np.array(lengths), most_tokens)


def test_short_rows_fill_up_what_long_ones_leave() -> None:
    assert fill_micro_batches(np.array([3, 12, 7, 2, 8, 1]), 10) == [[0, 2], [1], [3, 4], [5]]
    assert fill_micro_batches(np.array([4, 4, 4]), 100) == [[0, 1, 2]]


def training_of(**values: object) -> TrainingSettings:
    return TrainingSettings.model_validate({"sampling": "sequential", "gradient_accumulation_steps": 1, **values})


def test_micro_batches_of_a_run_are_counted_step_by_step() -> None:
    def filled(lengths: list[int], rows: int, num_steps: int) -> dict[int, int]:
        training = training_of(micro_batch_size=rows, micro_batch_tokens=10)
        return micro_batch_tokens(np.array(lengths), training, num_steps=num_steps, is_packed=False)

    assert filled([6, 4, 6, 4], rows=2, num_steps=2) == {10: 2}
    assert filled([6, 6, 4, 4], rows=2, num_steps=2) == {6: 2, 8: 1}
    assert filled([6, 6, 4, 4], rows=4, num_steps=1) == {10: 2}
    assert filled([6, 6, 4], rows=2, num_steps=3) == {6: 4, 4: 1}  # the last step of an epoch has one row


def test_padded_micro_batches_are_as_long_as_their_longest_row_and_packed_ones_as_their_tokens() -> None:
    def tokens(*, is_packed: bool) -> dict[int, int]:
        training = training_of(micro_batch_size=2)
        return micro_batch_tokens(np.array([3, 7, 5]), training, num_steps=2, is_packed=is_packed)

    assert tokens(is_packed=False) == {14: 1, 5: 1}
    assert tokens(is_packed=True) == {10: 1, 5: 1}


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    training=st.builds(
        training_of,
        micro_batch_size=st.integers(1, 5),
        gradient_accumulation_steps=st.integers(1, 4),
        micro_batch_tokens=st.none() | st.integers(8, 200),
        sampling=st.sampled_from(["random", "group_by_length", "sequential"]),
        seed=st.integers(0, 3),
    ),
)
def test_every_row_is_in_one_micro_batch_of_each_epoch(lengths: list[int], training: TrainingSettings) -> None:
    num_steps = 2 * training.steps_per_epoch(len(lengths))
    counted = partial(micro_batch_tokens, np.array(lengths), training, num_steps=num_steps)
    joined, other = counted(is_packed=True), counted(is_packed=False)
    assert sum(tokens * number for tokens, number in joined.items()) == 2 * sum(lengths)
    if training.micro_batch_tokens is not None:
        assert joined == other
        return
    assert joined.total() == other.total() == 2 * ceil(len(lengths) / training.micro_batch_size)
    assert sum(tokens * number for tokens, number in other.items()) >= 2 * sum(lengths)


def test_a_step_is_collated_into_joined_rows_whose_positions_restart() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": list(range(10, 22)), "labels": [-100, *range(11, 22)]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    settings = TrainingSettings(micro_batch_tokens=8)
    batch = StepCollator(BatchCollator(0, packing=True), settings, rank=0)(rows)
    first, second = micro_batches_of(batch)
    assert (batch[NUM_MICRO_BATCHES], batch[NUM_TRAINED]) == (2, 15)
    assert first["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # Nothing predicts the first token of a row, nor the last of the one before it.
    assert first["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert first["trained_positions"].tolist() == [0, 1, 3]
    assert first["trained_targets"].tolist() == [6, 7, 9]
    assert first["num_tokens"] == 5
    assert second["input_ids"].tolist() == [list(range(10, 22))]


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_that_is_not_divided_is_one_micro_batch(packing: bool) -> None:
    batch = BatchCollator(0, packing=packing)([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert micro_batches_of(batch) == [batch]
