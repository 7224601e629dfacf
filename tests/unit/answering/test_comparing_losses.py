"""Losses of runs: paired by row whatever their order, judged by the error of the difference, kept and read back."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.cli.rendering.comparison_text import failure_line, render_comparison
from qlora_cli.evaluating.comparison_result import NUM_STDERRS, ComparedRun, LossOf, RunComparison, Verdict
from qlora_cli.evaluating.paired_losses import LossesOfRows, judge
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.held_out_losses import HeldOutLosses, read_losses, write_losses

SEEDS = st.integers(0, 10_000)


def drawn(seed: int, num_rows: int = 12) -> LossesOfRows:
    chance = np.random.default_rng(seed)
    tokens = chance.integers(1, 40, num_rows)
    nll = chance.gamma(2.0, 1.0, num_rows) * tokens
    return LossesOfRows.in_order(chance.integers(-(2**63), 2**63 - 1, num_rows), nll, tokens)


def changed(losses: LossesOfRows, by: float, noise: float, seed: int = 0) -> LossesOfRows:
    """Return other losses of the same rows: higher by `by` nats a token on average, with noise of each row."""
    chance = np.random.default_rng(seed)
    nll = losses.nll + (by + noise * chance.normal(size=len(losses.nll))) * losses.tokens
    return LossesOfRows(digests=losses.digests, nll=nll, tokens=losses.tokens)


# ---- pairing


@given(SEEDS)
def test_rows_are_paired_whatever_their_order(seed: int) -> None:
    losses = drawn(seed)
    order = np.random.default_rng(seed + 1).permutation(len(losses.nll))
    shuffled = LossesOfRows.in_order(losses.digests[order], losses.nll[order], losses.tokens[order])
    assert shuffled.has_rows_of(losses)
    assert judge(shuffled, losses, margin=0.0) == "not_worse"
    assert shuffled.stderr_of_difference(losses) == pytest.approx(0, abs=1e-12)


@given(SEEDS, st.integers(0, 11))
def test_a_row_that_differs_is_noticed_and_the_others_are_counted(seed: int, row: int) -> None:
    losses = drawn(seed)
    digests, tokens = losses.digests.copy(), losses.tokens.copy()
    digests[row] ^= 1
    tokens[row] += 1
    other = LossesOfRows.in_order(digests, losses.nll, losses.tokens)
    assert not other.has_rows_of(losses)
    assert other.num_shared(losses) == losses.num_shared(other) == 11
    assert not LossesOfRows.in_order(losses.digests, losses.nll, tokens).has_rows_of(losses)


def test_a_row_that_occurs_twice_is_shared_as_often_as_both_have_it() -> None:
    twice = LossesOfRows.in_order(np.array([5, 5, 7]), np.ones(3), np.ones(3, np.int64))
    once = LossesOfRows.in_order(np.array([7, 5, 8]), np.ones(3), np.ones(3, np.int64))
    assert twice.num_shared(once) == 2


# ---- verdicts


@given(SEEDS, st.floats(-0.5, 0.5), st.floats(0.001, 1.0), st.floats(0, 0.3))
def test_a_verdict_is_by_the_difference_and_its_standard_error(
    seed: int, by: float, noise: float, margin: float
) -> None:
    reference = drawn(seed)
    run = changed(reference, by, noise, seed)
    stderr = run.stderr_of_difference(reference)
    assert stderr is not None
    difference = run.loss - reference.loss
    # The paired error is that of the mean of the rows' differences, weighted by tokens.
    residuals = (run.nll - reference.nll) - difference * run.tokens
    assert stderr == pytest.approx(math.sqrt(12 / 11 * (residuals**2).sum()) / run.tokens.sum())
    low, high = difference - NUM_STDERRS * stderr, difference + NUM_STDERRS * stderr
    expected = "worse" if low > margin else "not_worse" if high <= margin else "unclear"
    if min(abs(low - margin), abs(high - margin)) > 1e-9:
        assert judge(run, reference, margin) == expected


@given(SEEDS)
def test_more_margin_never_makes_a_verdict_worse(seed: int) -> None:
    reference = drawn(seed)
    run = changed(reference, 0.1, 0.2, seed)
    order: list[Verdict] = ["worse", "unclear", "not_worse"]
    ranks = [order.index(judge(run, reference, margin)) for margin in np.linspace(0, 1, 21)]
    assert ranks == sorted(ranks)


def test_a_single_row_decides_nothing_and_a_loss_that_is_not_finite_is_worse() -> None:
    one = drawn(0, num_rows=1)
    assert judge(changed(one, 5.0, 0.0), one, margin=0.0) == "unclear"
    finite = drawn(0)
    broken = LossesOfRows(digests=finite.digests, nll=finite.nll * np.nan, tokens=finite.tokens)
    assert judge(broken, finite, margin=100.0) == "worse"
    assert judge(finite, broken, margin=0.0) == "not_worse"


# ---- kept in the run


def kept(**changed: object) -> HeldOutLosses:
    content: dict[str, object] = {
        "fingerprint": "of the rows",
        "weights": "of the adapter",
        "device": "cpu",
        "compute_dtype": "fp32",
        "quantization": "nf4",
        "row_digests": (-(2**63), 2**63 - 1),
        "row_nll": (0.1 + 0.2, 3e-17),
        "row_tokens": (3, 1),
    }
    return HeldOutLosses.model_validate({**content, **changed})


def test_losses_are_read_as_they_were_written_for_the_same_weights_and_rows(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert read_losses(run, fingerprint="of the rows", weights="of the adapter") is None
    write_losses(run, kept())
    assert read_losses(run, fingerprint="of the rows", weights="of the adapter") == kept()
    assert read_losses(run, fingerprint="of other rows", weights="of the adapter") is None
    assert read_losses(run, fingerprint="of the rows", weights="of another adapter") is None


DAMAGES: list[Callable[[str], str]] = [
    lambda text: text[:-20],
    lambda _: "[1, 2]",
    lambda _: "[" * 100_000,
    lambda text: text.replace("3e-17", "NaN"),
    lambda text: text.replace("3e-17", "3e-17, 1.0"),
    lambda text: text.replace(str(2**63 - 1), str(2**80)),
    lambda text: text.replace('"row_tokens": [3, 1]', '"row_tokens": [0, 0]'),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_counts_as_none(damage: Callable[[str], str], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_losses(run, kept())
    written = run.losses_file.read_text()
    assert damage(written) != written
    run.losses_file.write_text(damage(written))
    assert read_losses(run, fingerprint="of the rows", weights="of the adapter") is None


def with_answers(**changed: Any) -> HeldOutLosses:
    answers = {
        "nll": (1.0, 2.5),
        "tokens": (3, 4),
        "reference_nll": (1.5, 2.0),
        "is_desirable": (True, False),
        "gain": (0.25, -0.5),
        "rows_per_baseline": 2,
    }
    return HeldOutLosses.model_validate({**kept().model_dump(), "answers": {**answers, **changed}})


def test_answers_that_are_compared_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_losses(run, with_answers())
    assert read_losses(run, fingerprint="of the rows", weights="of the adapter") == with_answers()
    write_losses(run, with_answers(gain=(0.25, math.nan)))
    assert read_losses(run, fingerprint="of the rows", weights="of the adapter") is None


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": (3, 0)},
        {"reference_nll": (1.5,)},
        {"is_desirable": None},  # of pairs, there is no baseline
        {"is_desirable": None, "gain": None, "rows_per_baseline": None},  # one pair, and two rows
        {"gain": None},
        {"rows_per_baseline": 0},
        {"rows_per_baseline": None},
    ],
)
def test_answers_that_do_not_fit_together_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must |greater"):
        with_answers(**changed)


# ---- what CI reads


def compared(path: str, verdict: Verdict, accuracy: float | None = None) -> ComparedRun:
    return ComparedRun(
        path=Path(path),
        state="done",
        step=4,
        loss=1.0,
        loss_stderr=0.1,
        difference=None if verdict == "reference" else 0.1,
        difference_stderr=None if verdict == "reference" else 0.01,
        accuracy=accuracy,
        accuracy_stderr=None if accuracy is None else 0.05,
        accuracy_difference=None if accuracy is None or verdict == "reference" else 0.125,
        accuracy_difference_stderr=None if accuracy is None or verdict == "reference" else 0.025,
        num_rows_lower=0,
        num_rows_higher=0,
        verdict=verdict,
        was_measured=False,
        device="cpu",
        compute_dtype="fp32",
        quantization="nf4",
        tokens_per_second=None,
        duration_seconds=1.0,
        peak_device_bytes=None,
        peak_host_bytes=None,
        adapter_rank=None,
        effective_rank=None,
        relative_update_norm=None,
        forgetting=None,
    )


def comparison_of(*runs: ComparedRun, loss_of: LossOf = "tokens") -> RunComparison:
    return RunComparison(
        reference=Path("first"),
        dataset="rows",
        num_rows=3,
        num_tokens=30,
        loss_of=loss_of,
        margin=0.02,
        is_worse=True,
        runs=runs,
        differing_settings=(),
        notes=(),
    )


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("not_worse", "not_worse"), None),
        (("worse", "unclear"), "failed: run-1: worse than first by more than 0.02 nats"),
        (("not_worse", "unclear"), "warning: run-2: can't be told from first within 0.02 nats"),
        (("worse", "worse"), "failed: run-1, run-2: worse than first"),
    ],
)
def test_the_line_for_ci_names_the_runs_that_fail(verdicts: tuple[Verdict, Verdict], expected: str | None) -> None:
    runs = (compared("first", "reference"), *(compared(f"run-{at}", one) for at, one in enumerate(verdicts, start=1)))
    line = failure_line(comparison_of(*runs))
    assert line == expected if expected is None else line is not None and line.startswith(expected)


def test_answers_that_are_compared_have_a_loss_of_their_own_and_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = comparison_of(compared("a", "reference", 0.5), compared("b", "worse", 0.625), loss_of="kto")
    render_comparison(comparison, has_margin=True)
    shown = capsys.readouterr().out
    assert "2 runs on rows: 3 rows, 30 tokens of chosen answers" in shown
    assert "kto loss" in shown
    assert "  b  62.5% ± 5.0%, +12.5% ± 2.5%\n" in shown
    line = failure_line(comparison)
    assert line is not None
    assert "by more than 0.02 of the kto loss, beyond" in line
