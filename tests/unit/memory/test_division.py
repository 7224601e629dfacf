"""Into which micro-batches a plan divides the rows of a step, by made-up predictions of time and memory."""

from math import ceil

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.fitting.division import MICRO_BATCH_TOKENS, worthwhile_divisions
from qlora_cli.memory.fitting.plan import CHECKPOINTING, PlannedRun, describe, plan_run
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, StepTime
from qlora_cli.memory.request import Predict
from qlora_cli.memory.run_batches import StepRows
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.run_ratios import RunKey
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import CONTEXT, card, estimate

LONGEST, MEAN, ROWS = 1024, 256, 16
OPEN = EstimateSettings.model_validate({"model": {"name": "any"}, "data": {"max_length": LONGEST}})
RECOMPUTED = {"off": 1.0, "selective": 1.1, "on": 1.3}  # of the time of a micro-batch
KEPT_TOKENS = {"off": 128, "selective": 256, "on": 1024}  # in a GiB


def time_of(seconds: float) -> StepTime:
    return StepTime(
        micro_batch_seconds=seconds,
        update_seconds=1,
        step_seconds=ROWS * seconds + 1,
        step_seconds_low=0.0,
        step_seconds_high=0.0,
        tokens_per_second=0.0,
        tokens_per_second_low=0.0,
        tokens_per_second_high=0.0,
        device_seconds=0.0,
        host_seconds=0.0,
        limited_by="host",
        rates="data sheet",
        key=RunKey(device="a card", kind="nf4", limit="device", basis=""),
    )


def predictor(fixed: float, asked: list[int | None] | None = None, *, joins: bool = True) -> Predict:
    """Return predictions of a micro-batch that takes `fixed` seconds, and one more for 1,024 tokens.

    Without `joins`, several rows can't be in one micro-batch.
    """

    def predict(run: EstimateSettings, gpu: Gpu) -> Estimate:
        tokens, kind = run.training.micro_batch_tokens, run.training.gradient_checkpointing.value
        if asked is not None:
            asked.append(tokens)
        if tokens is not None and not joins:
            raise ModelError("does not join", hint="")
        kind = "on" if kind == "auto" else kind
        if kind == "offload":
            raise ModelError("no offload", hint="")
        num_tokens = tokens or run.data.max_length
        num_bytes = CONTEXT + GIB + num_tokens * GIB // KEPT_TOKENS[kind]
        seconds = (fixed + num_tokens / 1024) * RECOMPUTED[kind]
        predicted = estimate(num_bytes, low=num_bytes - CONTEXT, gpu=gpu.name, checkpointing=kind)
        return Estimate(**{**vars(predicted), "time": time_of(seconds)})

    return predict


def rows_of(mean: float = MEAN) -> StepRows:
    return StepRows(num_rows=ROWS, mean_tokens=mean, num_filled=lambda tokens: ceil(ROWS / max(1, tokens // mean)))


def plan(memory: float, predict: Predict, **training: object) -> PlannedRun:
    run = EstimateSettings.model_validate({**OPEN.model_dump(), "training": training})
    return plan_run(run, card(round(memory * GIB)), predict, lambda *_: (), rows_of())


@pytest.mark.parametrize(
    ("fixed", "tokens"),
    [
        (0, [None]),  # nothing is gained
        (0.04, [None, 1024]),  # 16 times 0.04 s of 4.6, then 4 times
        (0.15, [None, 1024, 2048]),
        (4, [None, 1024, 2048, 4096]),
    ],
)
def test_micro_batches_grow_as_long_as_that_makes_a_step_faster(fixed: float, tokens: list[int | None]) -> None:
    divisions = worthwhile_divisions(OPEN, card(GIB), predictor(fixed), rows_of())
    assert [division.tokens for division in divisions] == tokens
    one_row = divisions[0]
    assert one_row.num_micro_batches == ROWS
    # A row of the mean length, not of the longest.
    assert one_row.step_seconds(time_of(fixed + 1)) == pytest.approx(1 + ROWS * (fixed + MEAN / 1024))


def test_rows_that_do_not_meet_in_a_micro_batch_are_not_tried_there() -> None:
    asked: list[int | None] = []
    divisions = worthwhile_divisions(OPEN, card(GIB), predictor(4, asked), rows_of(mean=600))
    assert [division.tokens for division in divisions] == [None, 2048, 4096]
    assert 1024 not in asked


def test_a_size_that_few_rows_share_does_not_keep_larger_ones_from_being_tried() -> None:
    # Of 1,024 tokens there are nearly as many as rows, which saves less than 5 % of the time.
    numbers = {1024: 15.0, 2048: 6.0, 4096: 3.0}
    rows = StepRows(num_rows=16, mean_tokens=500, num_filled=numbers.__getitem__)
    divisions = worthwhile_divisions(OPEN, card(GIB), predictor(0.4), rows)
    assert [division.tokens for division in divisions] == [None, 2048, 4096]


def test_micro_batches_take_the_time_of_what_they_hold_on_average() -> None:
    # Two rows of 600 tokens in 2,048, and none of 1,024.
    rows = StepRows(num_rows=16, mean_tokens=600, num_filled=lambda tokens: 8.0 if tokens == 2048 else 16.0)
    *_, filled = worthwhile_divisions(OPEN, card(GIB), predictor(1), rows)
    assert filled.tokens == 2048
    assert filled.step_seconds(time_of(1 + 2)) == pytest.approx(1 + 8 * (1 + 1200 / 1024))


def test_time_that_is_not_known_divides_nothing() -> None:
    def timeless(run: EstimateSettings, gpu: Gpu) -> Estimate:
        return Estimate(**{**vars(predictor(4)(run, gpu)), "time": None})

    assert not worthwhile_divisions(OPEN, card(GIB), timeless, rows_of())
    chosen = plan_run(OPEN, card(GIB), timeless, lambda *_: (), rows_of()).chosen
    assert MICRO_BATCH_TOKENS not in chosen.values


def test_a_model_that_can_not_join_rows_has_one_a_micro_batch() -> None:
    chosen = plan(40, predictor(4, joins=False)).chosen
    assert chosen.settings.training.micro_batch_tokens is None
    assert chosen.values[CHECKPOINTING] == "off"


@pytest.mark.parametrize("kind", ["off", "on"])
def test_only_the_division_is_planned_if_checkpointing_was_asked_for(kind: str) -> None:
    planned = plan(100, predictor(4), gradient_checkpointing=kind)
    assert planned.chosen.values == {MICRO_BATCH_TOKENS: 4096}
    assert planned.chosen.estimate.gradient_checkpointing == kind


@pytest.mark.parametrize("fixed", [0.0, 0.04, 0.25, 1.0, 4.0])
def test_more_memory_never_makes_a_step_slower(fixed: float) -> None:
    before, tokens = float("inf"), set()
    for quarters in range(8, 4 * 40):
        chosen = plan(quarters / 4, predictor(fixed)).chosen
        assert chosen.step_seconds is not None
        assert chosen.fits == "yes" or quarters / 4 < 2.6
        if chosen.fits == "yes":
            assert chosen.step_seconds <= before
            before = chosen.step_seconds
            tokens.add(chosen.settings.training.micro_batch_tokens)
    largest = worthwhile_divisions(OPEN, card(GIB), predictor(fixed), rows_of())[-1]
    assert largest.tokens in tokens
    assert before == pytest.approx(largest.step_seconds(time_of(fixed + (largest.tokens or LONGEST) / 1024)))


def test_what_takes_less_is_tried_in_order_of_memory_with_smaller_micro_batches() -> None:
    planned = plan(30, predictor(4))
    sizes = [candidate.high_bytes for candidate in (planned.chosen, *planned.leaner)]
    assert sizes == sorted(sizes, reverse=True)
    assert planned.chosen.settings.training.micro_batch_tokens == 4096
    assert planned.leaner[-1].settings.training.micro_batch_tokens == 2048
    assert "in micro-batches of 4,096 tokens" in describe(planned.plan)
