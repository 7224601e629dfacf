"""The summary of a run: its outcome and figures, also where its files are missing, broken or from another machine."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Event, Rehearsed, TrainingEnded, TrainingResumed, TrainingStarted
from qlora_cli.runs.find_runs import find_runs, is_run, read_run
from qlora_cli.runs.summary import RunSummary
from qlora_cli.units import GIB
from tests.support.runs.run_directories import START, a_record, eval_done, step_done, write_run

HERE = {"host": socket.gethostname()}
STEPS: list[Event] = [step_done(step) for step in range(1, 11)]


def summary_of(folder: Path, events: list[Event], record: dict[str, Any] | None, *, minutes: float = 1) -> RunSummary:
    """Return the summary of a run as seen some minutes after it began."""
    return read_run(write_run(folder, events, record), now=START + timedelta(minutes=minutes)).summary


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("status", ["done", "interrupted", "failed"])
def test_a_run_that_ended_has_its_recorded_status(tmp_path: Path, status: str) -> None:
    assert summary_of(tmp_path, [*STEPS], a_record(status, error="E: it broke")).state == status


def test_the_error_of_a_failed_run_is_shown(tmp_path: Path) -> None:
    assert summary_of(tmp_path, [], a_record("failed", error="E: it broke")).error == "E: it broke"
    assert summary_of(tmp_path, [], a_record("done")).error is None


def test_a_run_is_running_while_its_process_exists(tmp_path: Path) -> None:
    alive = a_record("running", pid=os.getpid(), **HERE)
    assert summary_of(tmp_path, [*STEPS], alive, minutes=600).state == "running"
    dead = a_record("running", pid=ended_pid(), **HERE)
    assert summary_of(tmp_path, [*STEPS], dead).state == "killed"


def test_a_process_that_began_after_the_record_was_written_is_another(tmp_path: Path) -> None:
    write_run(tmp_path, [*STEPS], a_record("running", pid=os.getpid(), **HERE))
    os.utime(tmp_path / "run.json", (1_000_000, 1_000_000))
    assert read_run(tmp_path).summary.state == "killed"


@pytest.mark.parametrize("known", [{}, {"pid": 1, "host": "another-host"}, {"pid": os.getpid()}, {**HERE}])
def test_a_process_that_cannot_be_checked_counts_as_dead_after_15_minutes(
    tmp_path: Path, known: dict[str, Any]
) -> None:
    record = a_record("running", **known)
    assert summary_of(tmp_path, [*STEPS], record, minutes=15).state == "running"
    assert summary_of(tmp_path, [*STEPS], record, minutes=15.2).state == "killed"
    assert summary_of(tmp_path, [], record, minutes=14.9).state == "running"  # by when it was started
    assert summary_of(tmp_path, [], record, minutes=15.1).state == "killed"


@pytest.mark.parametrize("pid", [-1, 2**70, 1.5, "7", None, True])
def test_a_nonsensical_process_id_does_not_crash(tmp_path: Path, pid: object) -> None:
    assert summary_of(tmp_path, [*STEPS], a_record("running", pid=pid, **HERE)).state in {"running", "killed"}


@pytest.mark.parametrize(
    ("signal", "expected"),
    [(None, "done"), ("SIGTERM", "interrupted")],
)
def test_without_a_record_the_outcome_is_read_from_the_events(
    tmp_path: Path, signal: str | None, expected: str
) -> None:
    ended = TrainingEnded(step=10, num_steps=100, interrupted_by=signal)
    summary = summary_of(tmp_path, [*STEPS, ended], None)
    assert (summary.state, summary.step, summary.num_steps) == (expected, 10, 100)
    assert summary.problems == ("there is no run.json",)
    assert summary_of(tmp_path, [*STEPS], None, minutes=60).state == "killed"
    assert summary_of(tmp_path, [*STEPS], None).state == "running"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"status": 7, "settings": [1], "plan": "x", "origins": null}', b"[" * 100_000],
)
def test_a_broken_record_is_reported_and_the_events_are_read(tmp_path: Path, content: bytes) -> None:
    write_run(tmp_path, [*STEPS, eval_done(10, 1.5)])
    (tmp_path / "run.json").write_bytes(content)
    run = read_run(tmp_path)
    assert (run.summary.step, run.summary.best_loss, run.summary.model) == (10, 1.5, None)
    assert run.record.settings_used == ()
    assert run.summary.problems


def test_an_unreadable_history_is_reported(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(a_record()))
    (tmp_path / "metrics.jsonl").mkdir()
    summary = read_run(tmp_path).summary
    assert summary.problems == ("metrics.jsonl can't be read: Is a directory",)
    assert (summary.state, summary.num_steps) == ("done", 100)


def test_figures_are_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-5", "step-10", ".step-15.1.saving", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir()
    events = [*STEPS, eval_done(5, 1.9), eval_done(9, 1.7), eval_done(10, 1.8)]
    summary = summary_of(tmp_path, events, a_record(result={"peak_memory": {"device_reserved_bytes": 9 * GIB}}))
    assert (summary.name, summary.path) == (tmp_path.name, tmp_path)
    assert (summary.step, summary.num_steps, summary.loss) == (10, 100, step_done(10).loss)
    assert (summary.best_loss, summary.best_step) == (1.7, 9)
    assert (summary.peak_allocated_bytes, summary.peak_reserved_bytes) == (6 * GIB, 9 * GIB)
    assert summary.peak_host_bytes == 3 * GIB
    assert (summary.predicted_allocated_bytes, summary.predicted_reserved_bytes) == (9 * GIB, 10 * GIB)
    assert (summary.predicted_process_bytes, summary.gpu) == (11 * GIB, "RTX 4090")
    assert (summary.model, summary.dataset) == ("Qwen/Qwen3-0.6B", ("train.jsonl", "more.jsonl"))
    assert summary.started == START.isoformat(timespec="seconds")
    assert [path.name for path in summary.checkpoints] == ["step-5", "step-10"]
    assert summary.sentence == "Done, 10 of 100 steps"


def test_the_peak_of_an_unfinished_run_is_the_largest_observed(tmp_path: Path) -> None:
    rehearsed = Rehearsed(
        micro_batch_size=1,
        longest_row_tokens=9,
        seconds=1,
        device_allocated_bytes=7 * GIB,
        device_reserved_bytes=None,
    )
    summary = summary_of(tmp_path, [rehearsed, *STEPS], a_record("failed"))
    assert (summary.peak_allocated_bytes, summary.peak_reserved_bytes) == (7 * GIB, 8 * GIB)


def test_without_a_record_the_prediction_is_read_from_the_events(tmp_path: Path) -> None:
    begun = TrainingStarted(
        num_steps=10, output=tmp_path, predicted_allocated_bytes=GIB, predicted_reserved_bytes=2 * GIB
    )
    summary = summary_of(tmp_path, [begun], None)
    assert (summary.predicted_allocated_bytes, summary.predicted_reserved_bytes) == (GIB, 2 * GIB)


def test_the_speed_is_averaged_over_all_steps_with_a_known_time(tmp_path: Path) -> None:
    fast: list[Event] = [step_done(step, tokens_per_second=1000.0) for step in range(1, 4)]  # 500 tokens each
    unknown, slow = step_done(4, tokens_per_second=float("nan")), step_done(5, tokens_per_second=100.0)
    speed = summary_of(tmp_path, [*fast, unknown, slow], None).tokens_per_second
    assert speed == pytest.approx(2000 / (1.5 + 5))
    broken: list[Event] = [step_done(1, tokens_per_second=float("nan"), loss=float("nan"))]
    summary = summary_of(tmp_path, [*broken], None)
    assert (summary.tokens_per_second, summary.loss) == (None, None)


def test_a_resumed_run_began_with_its_first_session(tmp_path: Path) -> None:
    resumed = TrainingResumed(step=5, num_steps=100, checkpoint=Path("c"))
    later = (START + timedelta(days=2)).isoformat(timespec="seconds")
    summary = summary_of(tmp_path, [*STEPS, resumed], {**a_record(), "started": later})
    assert summary.started == START.isoformat(timespec="seconds")
    assert (summary.step, summary.num_resumes) == (5, 1)


def test_runs_are_found_at_any_depth_but_not_within_runs_and_sorted_by_start(tmp_path: Path) -> None:
    for name, day in (("b/deep/second", 2), ("a/third", 3), ("first", 1)):
        write_run(tmp_path / name, [*STEPS], None, start=START + timedelta(days=day))
    write_run(tmp_path / "first" / "checkpoints" / "step-1", [], a_record())
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    runs = find_runs(tmp_path)
    assert [run.path.relative_to(tmp_path).as_posix() for run in runs] == [
        "broken",
        "first",
        "b/deep/second",
        "a/third",
    ]


def test_a_directory_may_be_a_run_itself_or_contain_none(tmp_path: Path) -> None:
    assert find_runs(tmp_path) == []
    assert not is_run(tmp_path)
    write_run(tmp_path / "run", [])
    assert is_run(tmp_path / "run")
    assert [run.name for run in find_runs(tmp_path / "run")] == ["run"]
