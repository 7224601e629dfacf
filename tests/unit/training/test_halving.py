"""Which rates are tried, which are dropped and which is chosen; what is kept of trials; the settings written."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.errors import OutputDirectoryError, TrainingError
from qlora_cli.evaluating.paired_losses import LossesOfRows, judge
from qlora_cli.tuning.halving import Halving, RateTrial, best_of, halve
from qlora_cli.tuning.trial_steps import FEWEST_STEPS, MOST_ADDED, TrialGrid, TuneRequest, grid_of, rounds_of
from qlora_cli.tuning.tuning_record import (
    RECORD_FILE,
    KeptTrial,
    TrialBasis,
    TuneRecord,
    read_tune_record,
    write_tune_record,
)

SEEDS = st.integers(0, 2**16)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
NUM_ROWS = 16


def trial(rate: float, steps: int, level: float, *, noise: float = 0.01, seed: int = 0) -> RateTrial:
    """Return a trial whose rows share a difficulty, and differ by `noise`."""
    tokens = np.arange(1, NUM_ROWS + 1)
    own = np.random.default_rng((seed, round(rate * 1e7), steps)).normal(0, noise, NUM_ROWS)
    nll = tokens * (level + np.random.default_rng(seed).uniform(1, 5, NUM_ROWS) + own)
    rows = LossesOfRows(digests=np.arange(NUM_ROWS), nll=nll, tokens=tokens)
    diverged = None if math.isfinite(level) else "the held-out loss is nan"
    return RateTrial(learning_rate=rate, num_steps=steps, rows=rows, diverged=diverged, seconds=1.0)


def grid(*, extends: bool = False, rounds: tuple[int, ...] = (8, 16)) -> TrialGrid:
    return TrialGrid(learning_rates=RATES, rounds=rounds, extends=extends)


# ---- what is tried


@given(st.integers(1, 100_000), st.floats(1e-6, 0.9), st.one_of(st.none(), st.integers(1, 1000)))
def test_rounds_rise_to_the_longest_trial_and_rates_surround_the_runs_own(
    run_steps: int, rate: float, steps: int | None
) -> None:
    found = grid_of(TuneRequest(trial_steps=steps), learning_rate=rate, run_steps=run_steps)
    assert found.rounds == tuple(sorted(set(found.rounds)))
    assert all(round_steps >= FEWEST_STEPS for round_steps in found.rounds[:-1])
    assert found.rounds[-1] == steps or (steps is None and found.rounds[-1] <= run_steps)
    assert rate in found.learning_rates
    assert found.learning_rates == tuple(sorted(set(found.learning_rates)))
    assert 0 < found.learning_rates[0] <= found.learning_rates[-1] < 1
    assert found.fewest_steps <= found.most_steps


@pytest.mark.parametrize(("longest", "rounds"), [(1, (1,)), (15, (8, 15)), (16, (8, 16)), (128, (32, 64, 128))])
def test_rounds_that_say_little_are_left_out(longest: int, rounds: tuple[int, ...]) -> None:
    assert rounds_of(longest) == rounds


# ---- what is dropped and chosen


@given(SEEDS, st.lists(st.floats(0, 0.5), min_size=4, max_size=4), st.floats(0, 0.3), st.booleans())
def test_the_chosen_rate_has_the_lowest_loss_of_the_longest_trials_and_only_what_is_clearly_worse_is_dropped(
    seed: int, levels: list[float], noise: float, extends: bool
) -> None:
    asked: list[tuple[float, int]] = []

    def run(rate: float, steps: int) -> RateTrial:
        asked.append((rate, steps))
        level = dict(zip(RATES, levels, strict=True)).get(rate, 1.0) + 8 / steps
        return trial(rate, steps, level, noise=noise, seed=seed)

    given_grid = grid(extends=extends)
    found = halve(given_grid, run)
    longest = [one for one in found.trials if one.num_steps == 16]
    assert all(found.chosen.loss <= one.loss for one in longest)
    assert len(set(asked)) == len(asked)
    assert given_grid.fewest_steps <= sum(steps for _, steps in asked) <= given_grid.most_steps
    first = {one.learning_rate: one for one in found.trials if one.num_steps == 8}
    best = best_of(found.trials, 8)
    for rate in set(RATES) - {one.learning_rate for one in longest}:
        rows, best_rows = first[rate].rows, best.rows
        assert rows is not None
        assert best_rows is not None
        assert judge(rows, best_rows, margin=0.0) == "worse"
    assert best.learning_rate in {one.learning_rate for one in longest}


def rising(factor: float) -> Callable[[float, int], RateTrial]:
    """Return trials whose loss falls with the rate by `factor` for each doubling, without noise."""
    return lambda rate, steps: trial(rate, steps, 3 - factor * math.log2(rate), noise=1e-6)


@pytest.mark.parametrize("factor", [0.1, -0.1])
def test_rates_beyond_the_edge_are_tried_if_the_grid_is_ours_and_the_edge_is_named(factor: float) -> None:
    edge = max(RATES) if factor > 0 else min(RATES)
    fixed = halve(grid(), rising(factor))
    assert (fixed.chosen.learning_rate, fixed.is_at_edge) == (edge, True)
    extended = halve(grid(extends=True), rising(factor))
    assert extended.chosen.learning_rate == edge * 2 ** (MOST_ADDED * math.copysign(1, factor))
    assert extended.is_at_edge


def valley(rate: float, steps: int) -> RateTrial:
    return trial(rate, steps, abs(math.log2(rate / 16e-4)), noise=1e-6)


def test_a_lowest_loss_just_beyond_the_edge_is_found_and_is_no_edge() -> None:
    found = halve(grid(extends=True), valley)
    assert (found.chosen.learning_rate, found.is_at_edge) == (16e-4, False)


def diverging_above(limit: float) -> Callable[[float, int], RateTrial]:
    return lambda rate, steps: trial(rate, steps, math.nan if rate > limit else 1.0, noise=1e-6)


def halved(limit: float) -> Halving:
    return halve(grid(), diverging_above(limit))


def test_a_rate_that_diverges_is_tried_once_and_if_all_do_it_is_an_error_that_says_why() -> None:
    found = halved(2e-4)
    assert [one.num_steps for one in found.trials if one.learning_rate > 2e-4] == [8, 8]
    with pytest.raises(TrainingError, match=r"every learning rate diverged: 0\.0001: the held-out loss is nan"):
        halved(0)


# ---- what is kept


def basis(**changed: object) -> TrialBasis:
    content: dict[str, object] = {
        "settings": {"lora.rank": 16, "data.dataset": ["a"]},
        "base": "of the base",
        "train_fingerprint": "of the rows",
        "eval_fingerprint": "of others",
        "num_rows": 2,
        "device": "cpu",
        "compute_dtype": "fp32",
    }
    return TrialBasis.model_validate({**content, **changed})


def kept(rate: float, **changed: object) -> KeptTrial:
    content: dict[str, object] = {
        "learning_rate": rate,
        "num_steps": 8,
        "row_nll": (0.1 + 0.2, 3e-17),
        "diverged": None,
        "seconds": 1.5,
    }
    return KeptTrial.model_validate({**content, **changed})


def record() -> TuneRecord:
    trials = (kept(1e-4), kept(2e-4, row_nll=None, diverged="step 3: the loss is nan"))
    return TuneRecord(basis=basis(), row_tokens=(3, 1), start_nll=(2.5, 0.5), trials=trials)


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_tune_record(tmp_path) is None
    write_tune_record(tmp_path, record())
    assert read_tune_record(tmp_path) == record()
    found = record().trial(1e-4, 8)
    assert found is not None
    assert found.loss == pytest.approx((0.1 + 0.2 + 3e-17) / 4)
    assert record().trial(1e-4, 16) is None
    diverged = record().trial(2e-4, 8)
    assert diverged is not None
    assert diverged.loss == math.inf


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[:-20],
    "a list": lambda _: "[1, 2]",
    "nested": lambda _: "[" * 100_000,
    "nan": lambda text: text.replace("3e-17", "NaN"),
    "another row": lambda text: text.replace("3e-17", "3e-17, 1.0"),
    "no loss": lambda text: text.replace('"step 3: the loss is nan"', "null"),
    "no tokens": lambda text: text.replace('"row_tokens": [3, 1]', '"row_tokens": [0, 0]'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_one_error_with_what_to_do(damage: str, tmp_path: Path) -> None:
    write_tune_record(tmp_path, record())
    file = tmp_path / RECORD_FILE
    written = file.read_text()
    assert DAMAGES[damage](written) != written
    file.write_text(DAMAGES[damage](written))
    with pytest.raises(OutputDirectoryError, match="can't be read") as caught:
        read_tune_record(tmp_path)
    assert "Delete it to start over" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"settings": {"lora.rank": 8, "data.dataset": ["a"]}}, r"lora\.rank \(16, now 8\)$"),
        ({"train_fingerprint": "x", "num_rows": 3}, "rows to train on, held-out rows$"),
        ({"base": None, "device": "cuda"}, "files of the base, device$"),
    ],
)
def test_trials_of_other_settings_or_rows_are_refused_by_name(changed: dict[str, object], says: str) -> None:
    record().check_basis(basis(), Path("tune.json"))
    with pytest.raises(OutputDirectoryError, match=says):
        record().check_basis(basis(**changed), Path("tune.json"))
