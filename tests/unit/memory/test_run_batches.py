"""The micro-batches of a run over rows of one length, and the parabola through the times of a few of their sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.errors import UsageError
from qlora_cli.memory.costs.run_time import MAX_PREDICTED, interpolated, predicted_sizes
from qlora_cli.memory.run_batches import RunBatches, average_step, run_batches, with_tokens
from qlora_cli.settings.models import EstimateSettings, PredictionSettings


def settings_of(*, packing: bool = False, **training: object) -> EstimateSettings:
    data = {"max_length": 4096, "packing": packing}
    return EstimateSettings.model_validate({"model": {"name": "m"}, "data": data, "training": training})


@given(
    rows=st.integers(1, 10_000),
    mean_tokens=st.integers(8, 4096),
    size=st.integers(1, 8),
    accumulation=st.integers(1, 16),
    tokens=st.none() | st.integers(8, 20_000),
    epochs=st.sampled_from([0.5, 1, 3]),
)
def test_micro_batches_have_the_tokens_of_all_rows(
    rows: int, mean_tokens: int, size: int, accumulation: int, tokens: int | None, epochs: float
) -> None:
    settings = settings_of(
        micro_batch_size=size, gradient_accumulation_steps=accumulation, micro_batch_tokens=tokens, epochs=epochs
    )
    batches = run_batches(settings, PredictionSettings(rows=rows, mean_tokens=mean_tokens))
    assert batches is not None
    assert batches.num_steps == settings.training.num_steps(rows)
    fed = rows * batches.num_steps / settings.training.steps_per_epoch(rows)
    num_tokens = sum(number * own for own, number in batches.by_tokens)
    assert fed * mean_tokens <= num_tokens * (1 + 1e-9)
    # At most a padded micro-batch an epoch, or one of each size, is counted in addition.
    assert num_tokens <= fed * mean_tokens + (epochs + 2) * max(own for own, _ in batches.by_tokens)


@given(
    rows=st.integers(1, 200),
    size=st.integers(1, 4),
    accumulation=st.integers(1, 16),
    tokens=st.none() | st.integers(600, 4000),
    num_gpus=st.integers(1, 8),
)
def test_of_several_processes_the_one_with_most_is_counted(
    rows: int, size: int, accumulation: int, tokens: int | None, num_gpus: int
) -> None:
    asked = PredictionSettings(rows=rows, mean_tokens=256)

    def batches_on(number: int) -> RunBatches | None:
        settings = settings_of(
            micro_batch_size=size,
            gradient_accumulation_steps=accumulation,
            micro_batch_tokens=tokens,
            num_gpus=number,
        )
        return run_batches(settings, asked)

    alone, one = batches_on(1), batches_on(num_gpus)
    assert alone is not None
    assert one is not None
    assert one.num_steps == alone.num_steps
    fed, all_fed = (sum(number * own for own, number in batches.by_tokens) for batches in (one, alone))
    largest = max(own for own, _ in (*alone.by_tokens, *one.by_tokens))
    assert all_fed / num_gpus <= fed + largest
    assert fed <= all_fed + 2 * largest  # with more processes than micro-batches, one has all of them


def test_packed_rows_are_fed_in_full_ones_and_max_steps_overrides_epochs() -> None:
    asked = PredictionSettings(rows=4096, mean_tokens=64)
    packed = run_batches(settings_of(packing=True, gradient_accumulation_steps=1), asked)
    assert packed is not None
    assert (packed.num_steps, packed.by_tokens) == (64, ((4096, 64),))
    limited = run_batches(settings_of(packing=True, gradient_accumulation_steps=1, max_steps=7), asked)
    assert limited is not None
    assert (limited.num_steps, limited.by_tokens) == (7, ((4096, 7),))
    assert run_batches(settings_of(), PredictionSettings()) is None


@given(rows=st.integers(1, 200), mean_tokens=st.integers(8, 4096), accumulation=st.integers(1, 32))
def test_a_step_on_average_is_filled_as_the_run_is(rows: int, mean_tokens: int, accumulation: int) -> None:
    asked = PredictionSettings(rows=rows, mean_tokens=mean_tokens)
    settings = settings_of(gradient_accumulation_steps=accumulation)
    step = average_step(settings, asked)
    assert step is not None
    assert (step.num_rows, step.mean_tokens) == (min(rows, accumulation), mean_tokens)
    for tokens in (mean_tokens, 4096, 16_384):
        filled = run_batches(settings_of(gradient_accumulation_steps=step.num_rows, micro_batch_tokens=tokens), asked)
        assert filled is not None
        num_full_steps = rows // step.num_rows
        assert sum(number for _, number in filled.by_tokens) >= num_full_steps * step.num_filled(tokens)


def test_rows_cannot_be_longer_on_average_than_the_longest() -> None:
    with pytest.raises(UsageError, match="mean_tokens: 5,000 is more than the 4,096 tokens that a row may"):
        run_batches(settings_of(), PredictionSettings(rows=100, mean_tokens=5000))


@pytest.mark.parametrize("tokens", [8, 100, 4096, 9000])
def test_settings_for_micro_batches_of_some_tokens_keep_how_they_are_made(tokens: int) -> None:
    padded = with_tokens(settings_of(micro_batch_size=2), tokens)
    assert (padded.data.max_length, padded.training.micro_batch_size) == (max(8, tokens // 2), 2)
    filled = with_tokens(settings_of(micro_batch_tokens=9000), tokens)
    assert (filled.data.max_length, filled.training.micro_batch_tokens) == (min(4096, tokens), tokens)


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=200))
def test_few_sizes_are_predicted_and_they_enclose_all(tokens: list[int]) -> None:
    sizes = predicted_sizes(tokens)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= MAX_PREDICTED
    assert (sizes[0], sizes[-1]) == (min(tokens), max(tokens))


def thousandths(whole: float) -> st.SearchStrategy[float]:
    """Return seconds: those near the smallest number that a float holds are rounded to a few bits, and no time."""
    return st.integers(0, 1000).map(lambda share: share / 1000 * whole)


@given(
    constant=thousandths(1),
    linear=thousandths(1e-3),
    quadratic=thousandths(1e-7),
    sizes=st.sets(st.integers(1, 30_000), min_size=3, max_size=6),
    share=st.floats(0, 1),
)
def test_what_is_constant_linear_and_quadratic_is_met_exactly(
    constant: float, linear: float, quadratic: float, sizes: set[int], share: float
) -> None:
    def seconds(tokens: int) -> float:
        return constant + linear * tokens + quadratic * tokens**2

    known = [(size, seconds(size)) for size in sorted(sizes)]
    asked = round(min(sizes) + share * (max(sizes) - min(sizes)))
    assert interpolated(known, asked) == pytest.approx(seconds(asked), rel=1e-6, abs=1e-6 * seconds(max(sizes)))


def test_of_two_sizes_it_is_the_line_and_of_one_that_one() -> None:
    assert interpolated([(10, 1.0), (20, 3.0)], 15) == pytest.approx(2.0)
    assert interpolated([(10, 1.0)], 10) == 1.0
