"""The predicted time of a whole run: the sum over its micro-batches, most of which are not traced."""

from collections.abc import Sequence

import pytest

from qlora_cli.memory.costs.run_time import MAX_PREDICTED, with_run
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.prediction import Estimate, RunFigures, StepTime, figures_of_run
from qlora_cli.memory.run_batches import RunBatches, run_batches, with_tokens
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.settings.models import EstimateSettings, PredictionSettings
from qlora_cli.settings.settle import with_settings
from tests.integration.memory.test_step_time import RTX_4090, WIDE, settings_of, time_of
from tests.support.models.tracing import deep_config

# Micro-batches by their tokens, as rows of very different lengths make them: short ones most often.
SIZES = tuple((tokens, 1 + 40_000 // tokens) for tokens in range(40, 4096, 311))


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    config = deep_config("llama", 2, **WIDE, head_dim=128)
    return Estimator(ModelFacts(name="wide", content={**config.to_dict(), "max_position_embeddings": 65_536}))


def run_of(estimator: Estimator, *, gpu: Gpu = RTX_4090, epochs: float = 1, **asked: object) -> RunFigures:
    settings = settings_of(epochs=epochs, micro_batch_size=2, gradient_accumulation_steps=2)
    prediction = PredictionSettings.model_validate(asked)
    return predicted(estimator, settings, run_batches(settings, prediction), gpu, prediction.price)


def predicted(
    estimator: Estimator,
    settings: EstimateSettings,
    batches: RunBatches | None,
    gpu: Gpu = RTX_4090,
    price: float | None = None,
) -> RunFigures:
    figures = figures_of_run(estimator.estimate(settings, RTX_4090))
    return with_run(figures, settings, batches, gpu, estimator.estimate, price=price)


def test_a_run_over_equal_rows_is_its_steps(estimator: Estimator) -> None:
    run = run_of(estimator, rows=1000, mean_tokens=512, epochs=2, price=3.0)
    step = time_of(estimator, length=512, micro_batch_size=2, gradient_accumulation_steps=2)
    assert run.num_steps == 500  # 2,000 rows, 4 in a step
    assert run.run_seconds == pytest.approx(500 * step.step_seconds)
    assert run.run_seconds_low == pytest.approx(500 * step.step_seconds_low)
    assert run.run_seconds_high == pytest.approx(500 * step.step_seconds_high)
    assert run.run_limited_by == step.limited_by
    assert run.cost == pytest.approx(3.0 * 500 * step.step_seconds / 3600)
    assert run.cost_high == pytest.approx(3.0 * 500 * step.step_seconds_high / 3600)
    assert run.energy_wh == pytest.approx(450 * 500 * step.step_seconds / 3600)
    assert run.energy_wh_low == pytest.approx(450 * 500 * step.step_seconds_low / 3600)
    assert run.step_seconds == pytest.approx(run_of(estimator).step_seconds)  # that of the longest rows


def test_a_run_has_no_cost_without_a_price_and_no_time_without_rows_or_rates(estimator: Estimator) -> None:
    assert run_of(estimator, rows=100).cost is None
    assert run_of(estimator, rows=100).num_steps == 25
    for unknown in (run_of(estimator), run_of(estimator, rows=100, gpu=find_gpu("24GiB"))):
        assert (unknown.num_steps, unknown.run_seconds, unknown.energy_wh) == (None, None, None)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"training.micro_batch_tokens": 4096, "training.gradient_accumulation_steps": 16},
        {"data.packing": True},
        {"training.gradient_checkpointing": Checkpointing.ON},
    ],
    ids=["padded", "filled", "packed", "recomputed"],
)
def test_the_sizes_that_are_not_traced_lie_where_tracing_would_put_them(
    estimator: Estimator, changed: dict[str, object]
) -> None:
    settings = with_settings(settings_of(gradient_accumulation_steps=1), changed)
    assert len(SIZES) > 2 * MAX_PREDICTED
    run = predicted(estimator, settings, RunBatches(num_steps=90, by_tokens=SIZES))

    def time(tokens: int) -> StepTime:
        of_size = estimator.estimate(with_tokens(settings, tokens), RTX_4090).time
        assert of_size is not None
        return of_size

    exact = sum(number * time(tokens).micro_batch_seconds for tokens, number in SIZES) + 90 * time(4096).update_seconds
    assert run.run_seconds == pytest.approx(exact, rel=0.02)


def test_only_a_few_sizes_are_traced(estimator: Estimator) -> None:
    lengths: list[int] = []

    def counting(settings: EstimateSettings, gpu: Gpu) -> Estimate:
        lengths.append(settings.data.max_length)
        return estimator.estimate(settings, gpu)

    settings = settings_of()
    figures = figures_of_run(estimator.estimate(settings, RTX_4090))
    with_run(figures, settings, RunBatches(num_steps=1, by_tokens=SIZES), RTX_4090, counting)
    assert len(lengths) == MAX_PREDICTED
    assert (min(lengths), max(lengths)) == (SIZES[0][0], SIZES[-1][0])


def test_rows_that_fill_micro_batches_take_no_time_for_what_they_do_not_fill(estimator: Estimator) -> None:
    settings = settings_of(gradient_accumulation_steps=16, micro_batch_tokens=4096)
    batches = run_batches(settings, PredictionSettings(rows=1600, mean_tokens=400))
    assert batches == RunBatches(num_steps=100, by_tokens=((2400, 100), (4000, 100)))  # ten rows and six
    padded = with_settings(settings, {"training.micro_batch_tokens": None})
    alone = predicted(estimator, padded, run_batches(padded, PredictionSettings(rows=1600, mean_tokens=400)))
    filled = predicted(estimator, settings, batches)
    assert _seconds([filled]) < _seconds([alone])


def _seconds(runs: Sequence[RunFigures]) -> float:
    return sum(run.run_seconds or 0.0 for run in runs)


def test_four_gpus_take_about_a_quarter_of_the_time_and_no_less_money(estimator: Estimator) -> None:
    def run_on(num_gpus: int) -> RunFigures:
        settings = settings_of(gradient_accumulation_steps=16, num_gpus=num_gpus)
        batches = run_batches(settings, PredictionSettings(rows=1600, mean_tokens=256))
        return predicted(estimator, settings, batches, price=1.0)

    one, four = run_on(1), run_on(4)
    assert four.num_steps == one.num_steps
    assert one.run_seconds is not None
    assert four.run_seconds is not None
    assert 1 / 4 < four.run_seconds / one.run_seconds < 1 / 3  # each makes the whole update
    assert four.cost == pytest.approx(4 * four.run_seconds / 3600)
    assert one.energy_wh is not None
    assert four.energy_wh is not None
    assert four.energy_wh > one.energy_wh
