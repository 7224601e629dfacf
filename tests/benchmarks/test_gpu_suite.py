"""The GPU suite without a GPU: its cases are valid, one that fails ends no other, and a second run continues."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_cases import CASES, Case, rehearsed
from benchmarks.gpu_processes import Ended, run_until
from benchmarks.gpu_suite import Suite, batches, remaining, select_cases
from benchmarks.records import append, read
from benchmarks.synthetic import SHAPES
from qlora_cli.settings.models import LoadSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.support.processes.forks import output_of

NAMED = {"model.name": "model", "data.dataset": "rows.jsonl", "output.directory": "run"}
GOOD = Case(name="good", size="tiny", settings={"quantization.method": "none"}, num_steps=0)
INVALID = Case(name="invalid", size="tiny", settings={"quantization.method": "nf3"}, num_steps=0)
SLOW = Case(name="slow", size="tiny", timeout_seconds=0.2)
WITHOUT_PACKAGE = Case(name="without-package", size="tiny", needs="no_such_package")


def check_settings(case: Case) -> None:
    values: dict[str, Any] = {**case.settings, "model.name": "model"}
    if case.num_steps:
        values |= NAMED | {"training.max_steps": case.num_steps}
        resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)
    else:
        resolve(Sources(flags={path: (path, value) for path, value in values.items()}), LoadSettings)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_settings_that_exist_also_when_it_is_rehearsed(case: Case) -> None:
    for one in (case, rehearsed(case)):
        assert one.size is None or one.size in SHAPES
        assert one.num_warmup_steps < one.num_steps or not one.num_steps
        check_settings(one)


def test_no_two_cases_have_the_same_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 40


def test_cases_are_selected_by_patterns_in_the_order_of_the_table() -> None:
    chosen = select_cases(["kernels", "1b-*"], ["*-memory-*"])
    assert {case.name.partition("-")[0] for case in chosen} == {"kernels", "1b"}
    assert chosen == [case for case in CASES if case in chosen]
    assert not any("memory" in case.name for case in chosen)


def test_only_cases_without_timing_run_at_the_same_time() -> None:
    sizes = [([case.name for case in batch], workers) for batch, workers in batches(CASES, 4)]
    assert [name for names, _ in sizes for name in names] == [case.name for case in CASES]
    timed = {case.name for case in CASES if case.is_timed}
    assert all((workers == 1) == (set(names) <= timed) for names, workers in sizes)


def record_of(case: Case, status: str) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(json.dumps({"case": asdict(case), "status": status}))
    return recorded


def test_a_second_run_leaves_out_what_is_measured_and_what_failed_comes_last() -> None:
    first, second, third = CASES[:3]
    records = [record_of(second, "done"), record_of(first, "timed out"), record_of(third, "failed")]
    assert remaining(CASES[:4], records) == [CASES[3], first, third]
    assert remaining(CASES[:4], [*records, record_of(first, "done")]) == [CASES[3], third]


def test_a_case_that_was_changed_since_is_measured_again() -> None:
    changed = replace(CASES[1], num_steps=CASES[1].num_steps + 1)
    assert remaining([changed], [record_of(CASES[1], "done")]) == [changed]


def test_a_record_that_was_cut_off_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, {"case": 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"case": 2, "sta')
    assert [*read([path])] == [{"case": 1}]


def run_forked(command: Sequence[str], *, seconds: float) -> Ended:
    """Run a case in a fork, which need not import everything again; one that is to be stopped as the suite does."""
    if seconds <= SLOW.timeout_seconds:
        return run_until(command, seconds=seconds)
    _python, _m, module, *arguments = command
    code, _, errors = output_of(arguments, os.environ, module=module)
    return Ended(exit_code=code, timed_out=False, seconds=0.0, errors=errors)


@pytest.mark.slow
def test_a_case_that_fails_or_takes_too_long_is_recorded_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "run_until", run_forked)
    arguments = argparse.Namespace(device="cpu", time_limit=600.0)
    results = tmp_path / "results.jsonl"
    cases = [INVALID, SLOW, WITHOUT_PACKAGE, GOOD]
    statuses = Suite(arguments, tmp_path, results, {"benchmark": "gpu_suite"}).run(cases, 1)
    assert statuses == ["failed", "timed out", "left out", "done"]
    records = [*read([results])]
    assert [record["case"]["name"] for record in records] == ["invalid", "slow", "good"]
    assert "nf3" in records[0]["error"]
    assert records[2]["model_bytes"] == records[2]["predicted_bytes"] > 0
    assert remaining(cases, records) == [WITHOUT_PACKAGE, INVALID, SLOW]
    assert [*tmp_path.glob("case-*"), *tmp_path.glob("model-*")] == []
    assert "needs no_such_package" in capsys.readouterr().out


def test_no_case_is_started_when_the_time_is_up(tmp_path: Path) -> None:
    arguments = argparse.Namespace(device="cpu", time_limit=0.0)
    results = tmp_path / "results.jsonl"
    assert Suite(arguments, tmp_path, results, {}).run([GOOD, SLOW], 2) == ["not started", "not started"]
    assert not results.exists()
