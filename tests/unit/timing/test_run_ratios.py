"""What runs on this machine correct: by the latest few of the same kind, from a file that many write to."""

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.cache import cache_folder
from qlora_cli.timing import rates_file
from qlora_cli.timing.rates_file import KnownRates, known_rates, rates_digest, store_run
from qlora_cli.timing.run_ratios import MARGIN, MAX_LINES, NUM_RUNS, Correction, RunKey, described

CARD = "RTX 4090"
BAD_RATIOS = ("0", "-1", "50", "nan", "inf")
RATIOS = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=3 * NUM_RUNS)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))


def known() -> KnownRates:
    rates = known_rates(CARD, card=CARD, num_sms=128)
    assert rates is not None
    return rates


def key(kind: str = "nf4, bf16", limit: str = "device") -> RunKey:
    return known().key_of(CARD, kind, limit)


def ratios_file() -> Path:
    (file,) = cache_folder("rates").glob("*.jsonl")
    return file


def num_runs() -> int:
    correction = known().correction(key())
    return 0 if correction is None else correction.num_runs


@given(RATIOS)
def test_a_correction_is_the_median_of_the_latest_runs_within_a_band_that_holds_them_all(ratios: list[float]) -> None:
    latest, correction = ratios[-NUM_RUNS:], Correction.of(ratios)
    assert correction.ratio == statistics.median(latest)
    assert correction.num_runs == len(latest)
    ends = correction.low * correction.ratio, correction.high * correction.ratio
    assert all(ends[0] < ratio < ends[1] for ratio in latest)
    assert correction.low <= 1 - MARGIN
    assert correction.high >= 1 + MARGIN
    assert Correction.of([9.0, *latest] if len(latest) == NUM_RUNS else latest) == correction


@given(st.floats(0.5, 2.0), st.floats(0.1, 10.0), st.integers(1, NUM_RUNS - 1))
def test_one_odd_run_of_three_and_more_moves_the_time_by_no_more_than_the_others_differ(
    ratio: float, odd: float, others: int
) -> None:
    ratios = [ratio] * (others + 1)
    ratios[others // 2] = odd
    assert Correction.of(ratios).ratio == (pytest.approx((ratio + odd) / 2) if others == 1 else ratio)


def test_more_runs_that_agree_make_the_band_narrower_and_runs_that_differ_wider() -> None:
    def width(ratios: Sequence[float]) -> float:
        correction = Correction.of(ratios)
        return correction.high - correction.low

    widths = [width([1.2] * number) for number in range(1, NUM_RUNS + 1)]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == NUM_RUNS
    assert width([1.0, 1.2, 1.5]) > width([1.19, 1.2, 1.21])


def test_a_run_corrects_those_of_its_kind_limit_and_rates_and_changes_the_digest() -> None:
    before = rates_digest()
    store_run(key(), 1.25)
    assert rates_digest() != before
    correction = known().correction(key())
    assert correction is not None
    assert correction.ratio == 1.25
    assert known().correction(key(kind="int8, bf16")) is None
    assert known().correction(key(limit="host")) is None
    faster = replace(known(), rates=replace(known().rates, flops=1e15))
    assert faster.correction(faster.key_of(CARD, "nf4, bf16", "device")) is None
    other = known_rates("RTX 3090", card="RTX 3090", num_sms=82)
    assert other is not None
    assert other.runs == ()


def test_runs_with_other_versions_correct_nothing_and_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store_run(key(), 1.25)
    current = rates_file.current_versions()
    monkeypatch.setattr(rates_file, "current_versions", lambda: ("torch 99.0", *current[1:]))
    assert num_runs() == 0
    assert "1 had other versions" in known().note
    store_run(key(), 1.5)
    assert num_runs() == 1
    assert known().note == ""


@pytest.mark.parametrize("bad", ["", "{", "null", "[1]", "\0\0", '{"ratio": 1}', "cut", "device", *BAD_RATIOS])
def test_a_damaged_or_foreign_line_is_ignored_with_a_note_and_the_others_count(bad: str) -> None:
    store_run(key(), 1.25)
    line = ratios_file().read_text(encoding="utf-8").splitlines()[0]
    content = json.loads(line)
    if bad == "cut":
        bad_line = line[:-20]
    elif bad == "device":
        bad_line = json.dumps({**content, "key": {**content["key"], "device": "another"}})
    elif bad in BAD_RATIOS:
        bad_line = json.dumps({**content, "ratio": float(bad)})
    else:
        bad_line = bad
    ratios_file().write_text(f"{line}\n{bad_line}\n", encoding="utf-8")
    store_run(key(), 1.5)
    assert num_runs() == 2
    assert "1 can't be read" in known().note


def test_a_line_that_a_killed_process_left_unfinished_does_not_spoil_the_next() -> None:
    store_run(key(), 1.25)
    with ratios_file().open("a", encoding="utf-8") as file:
        file.write('{"key"')
    store_run(key(), 1.5)
    assert num_runs() == 2


def test_runs_that_end_at_the_same_time_are_all_stored() -> None:
    own = key()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store_run(own, 1.25), range(64)))
    assert len(known().runs) == 64
    assert known().note == ""


def test_the_file_does_not_grow_without_end_and_keeps_the_latest() -> None:
    own = key()
    for index in range(MAX_LINES + 1):
        store_run(own, 1 + index / 1000)
    runs = known().runs
    assert len(runs) < MAX_LINES
    assert runs[-1].ratio == 1 + MAX_LINES / 1000


def test_a_correction_is_told_in_words() -> None:
    assert described("data sheet", None, 0) == "data sheet"
    assert described("data sheet", 1.234, 3) == "data sheet, corrected by 3 runs here: times 1.23"
    assert described("data sheet", 0.5, 1) == "data sheet, corrected by 1 run here: times 0.50"
