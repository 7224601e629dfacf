"""Impossible numbers in the files of a run: the figure is omitted and reported, and every view shows the rest."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.rendering.run_table import render_runs
from qlora_cli.cli.rendering.run_text import render_run
from qlora_cli.errors import QloraError
from qlora_cli.runs.detail import detail_of
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.find_runs import Run, find_runs, read_run
from qlora_cli.runs.record import read_record
from qlora_cli.runs.report.run_page import report_page
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.units import format_bytes, format_count, format_duration
from tests.fuzzing.run_files import EVENTS, MORE, RESULT
from tests.support.runs.run_directories import a_record, write_run

NUMBERS = (10**400, 10**4_000, 2**63, -(2**63), 1e308, math.inf, -math.inf, math.nan, -1, 0)
STEPS = [number for number, event in enumerate(EVENTS) if event["event"] == "step_done"]
HUGE = (10**400, 10**4_000, 2**63, -(2**63))
FREE = {"x_share": 0.5, "x_bytes": 5, "x_seconds": 1.5, "x_parameters": 5, "x": 5}
CONTENT: dict[str, Any] = {**a_record(), **MORE}
CONTENT = {**CONTENT, "plan": {**CONTENT["plan"], **FREE}, "hardware": {**CONTENT["hardware"], **FREE}, "seed": 5}
CONTENT["result"] = {**RESULT, "peak_memory": dict.fromkeys(("host_bytes", "device_reserved_bytes"), 5)}


def places(content: Any, *path: str) -> list[tuple[str, ...]]:
    """Return the path of every number in nested objects."""
    if isinstance(content, dict):
        return [place for key, part in content.items() for place in places(part, *path, key)]
    return [path] if isinstance(content, int | float) and not isinstance(content, bool) else []


def changed(content: dict[str, Any], place: tuple[str, ...], value: object) -> dict[str, Any]:
    whole = deepcopy(content)
    holder = whole
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return whole


def show(run: Run, *, on_page: bool) -> None:
    render_runs([run.summary], run.summary.path.parent)
    detail = detail_of(run)
    render_run(detail, run.history)
    print_json(detail.as_json())
    if on_page:
        report_page(run.summary, run.history, run.record)


@pytest.mark.parametrize("place", places(CONTENT), ids=".".join)
def test_a_number_in_a_record_is_shown_or_omitted_and_reported(tmp_path: Path, place: tuple[str, ...]) -> None:
    for value in NUMBERS:
        write_run(tmp_path / "run", record=changed(CONTENT, place, value))
        is_drawn = value in HUGE[:1]  # the curves do not depend on the record, and drawing them takes half a second
        lines = EVENTS[:9] if is_drawn else EVENTS[:1]
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = read_run(tmp_path / "run")
        show(run, on_page=is_drawn or value != value or value == math.inf)
        TrainResult.of_run(RunDirectory(tmp_path / "run"), run.record)
        if value in HUGE and place != ("schema_version",):
            assert any(problem.startswith(".".join(place)) for problem in run.summary.problems), value


@pytest.mark.parametrize("number", range(len(EVENTS)), ids=lambda number: f"{number}-{EVENTS[number]['event']}")
def test_a_number_anywhere_in_an_event_is_a_gap_or_a_damaged_line(tmp_path: Path, number: int) -> None:
    if EVENTS[number]["event"] == "step_done" and 3 < number < 28:
        pytest.skip("as the ones before it")
    for place in places(EVENTS[number]):
        for value in NUMBERS:
            lines = [*EVENTS[:number], changed(EVENTS[number], place, value), *EVENTS[number + 1 :]]
            write_run(tmp_path / "run", record=CONTENT)
            (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            show(read_run(tmp_path / "run"), on_page=value in NUMBERS[:1] and number not in STEPS[1:-1])


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    for number, place in enumerate(places(CONTENT)):
        write_run(tmp_path / str(number), record=changed(CONTENT, place, 10**4_000))
    write_run(tmp_path / "good", record=CONTENT)
    runs = find_runs(tmp_path)
    render_runs(runs, tmp_path)
    assert len(runs) == len(places(CONTENT)) + 1
    assert [run.name for run in runs if not run.problems] == ["good"]


def test_values_nested_too_deeply_are_omitted_and_reported(tmp_path: Path) -> None:
    for depth in (60, 400, 900, 5_000):
        write_run(tmp_path / "run")
        nested = "[" * depth + "]" * depth
        (tmp_path / "run" / "run.json").write_text(f'{{"status": "done", "plan": {{"x": {nested}}}}}')
        run = read_run(tmp_path / "run")
        show(run, on_page=True)
        assert run.summary.problems


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: str(float(number)) if abs(number) < 2e300 else "huge")
def test_every_number_has_a_text(number: Any) -> None:
    assert format_duration(number)
    if isinstance(number, int):
        assert format_bytes(number)
        assert format_count(number)


def test_an_unreadable_number_of_steps_is_an_error_where_it_is_compared(tmp_path: Path) -> None:
    record = read_record(write_run(tmp_path / "run", record=changed(CONTENT, ("plan", "num_steps"), 10**400)))
    assert record.plan.num_steps is None
    with pytest.raises(QloraError, match=r"does not say how many .*: plan\.num_steps: a number that no run has"):
        raise record.missing_error("how many steps there were to be", "plan.num_steps")
