"""The progress of a run as plain lines: in a log, a pipe, or a terminal that can't redraw."""

import gc
import io
import pickle
import statistics
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from rich.console import Console

from qlora_cli.cli.progress.event_text import describe_age, describe_event, describe_memory, describe_prediction
from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.cli.progress.plain_lines import PlainReporter
from qlora_cli.cli.progress.reporters import IMPORTING, importing
from qlora_cli.cli.progress.run_state import RunState
from qlora_cli.cli.progress.transfers import TRANSFERS, Transfer
from qlora_cli.events import (
    BytesDone,
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    Event,
    MemoryUse,
    Noted,
    PhaseStarted,
    Rehearsed,
    SampleDone,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
)
from tests.conftest import Recorder

GIB = 1024**3
GPU = MemoryUse(
    host_bytes=GIB, device_allocated_bytes=6 * GIB, device_reserved_bytes=7 * GIB, device_total_bytes=24 * GIB
)

GPU_PREDICTED = 7 * GIB * 102 // 100


def step(number: int, *, of: int = 10, memory: MemoryUse = GPU) -> StepDone:
    return StepDone(
        step=number,
        num_steps=of,
        epoch=number / of,
        loss=5.0 - number / 2,
        learning_rate=2e-4,
        grad_norm=0.5,
        num_tokens=100 * number,
        tokens_per_second=1234.5,
        elapsed_seconds=float(number),
        memory=memory,
    )


def test_steps_have_plain_lines_for_the_first_the_last_and_one_per_interval() -> None:
    file = io.StringIO()
    reporter = PlainReporter(file, interval_seconds=1000)
    reporter.report(PhaseStarted(title="Loading"))
    reporter.report(
        TrainingStarted(num_steps=10, num_epochs=1.0, output=Path("run"), predicted_reserved_bytes=GPU_PREDICTED)
    )
    for number in range(1, 11):
        reporter.report(step(number))
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["Loading …", "Training 10 steps into run"]
    assert [line.split()[1] for line in lines[2:]] == ["1/10", "10/10"]
    assert "loss 1.8233 ↓ (0.0000 in this step)  lr " in lines[-1]
    assert "  epoch 1.00 of 1.00  VRAM" in lines[-1]
    assert "VRAM 6.00 allocated / 7.00 reserved of 24.00 GiB  " in lines[-1]
    assert "predicted 7.14 (+2.0 %)" in lines[-1]
    assert "\x1b" not in file.getvalue()
    every = io.StringIO()
    eager = PlainReporter(every, interval_seconds=0)
    for number in range(1, 11):
        eager.report(step(number))
    assert len(every.getvalue().splitlines()) == 10


def test_other_events_have_plain_lines() -> None:
    file = io.StringIO()
    reporter = PlainReporter(file)
    reporter.report(Noted(message="cut", level="warning"))
    reporter.report(EvalDone(step=3, loss=1.5, seconds=2, is_best=True))
    reporter.report(CheckpointSaved(step=3, path=Path("run/checkpoints/step-3")))
    reporter.report(TrainingEnded(step=3, num_steps=9, interrupted_by="SIGTERM"))
    assert file.getvalue().splitlines() == [
        "warning: cut",
        "step 3: held-out loss 1.5000, best so far (2.00 s)",
        "step 3: checkpoint run/checkpoints/step-3",
        "Stopped by SIGTERM after step 3 of 9; the same command resumes there",
    ]


def downloaded(done_bytes: int, total_bytes: int = 4 * GIB) -> BytesDone:
    return BytesDone(kind="download", done_bytes=done_bytes, total_bytes=total_bytes)


def test_transfers_have_plain_lines_for_the_first_the_last_and_one_per_interval() -> None:
    file, every = io.StringIO(), io.StringIO()
    patient, eager = PlainReporter(file, interval_seconds=1000), PlainReporter(every, interval_seconds=0)
    for done in range(5):
        patient.report(downloaded(done * GIB))
        eager.report(downloaded(done * GIB))
    first, last = file.getvalue().splitlines()
    assert first == "Downloading: 0 B of 4.00 GiB (0%)"
    assert last.startswith("4.00 GiB downloaded")
    assert len(every.getvalue().splitlines()) == 5
    patient.report(downloaded(GIB))  # another one begins
    assert file.getvalue().splitlines()[2:] == ["Downloading: 1.00 GiB of 4.00 GiB (25%)"]


def test_speed_and_time_left_count_from_the_beginning_of_a_resumed_transfer() -> None:
    transfer = Transfer(started=100.0, first_bytes=GIB)
    assert transfer.describe(downloaded(2 * GIB), 120.0).endswith("2.00 GiB of 4.00 GiB (50%), 51.20 MiB/s, 40 s left")
    assert transfer.describe_end(downloaded(4 * GIB), 160.0) == "4.00 GiB downloaded in 1:00 (51.20 MiB/s)"
    assert transfer.describe_end(downloaded(4 * GIB), 100.0) == "4.00 GiB downloaded"


def test_an_empty_transfer_has_no_line() -> None:
    file = io.StringIO()
    PlainReporter(file).report(downloaded(0, 0))
    assert file.getvalue() == ""


def test_every_kind_of_transfer_has_its_description() -> None:
    kinds = get_args(get_type_hints(BytesDone)["kind"])
    assert set(kinds) == set(TRANSFERS)
    for kind in kinds:
        file = io.StringIO()
        PlainReporter(file).report(BytesDone(kind=kind, done_bytes=1, total_bytes=2))
        assert file.getvalue().startswith(TRANSFERS[kind][0])


def test_memory_on_a_cpu_is_that_of_the_process() -> None:
    assert describe_memory(MemoryUse(host_bytes=3 * GIB)) == "memory 3.00 GiB resident"


def test_a_gpu_figure_is_compared_with_its_prediction() -> None:
    assert describe_memory(GPU, is_short=True) == "VRAM 6.00 / 7.00 of 24.00 GiB"
    assert describe_prediction(GPU, 7 * GIB) == "predicted 7.00 (+0.0 %)"
    assert describe_prediction(GPU, None) is None
    assert describe_prediction(MemoryUse(host_bytes=GIB), 7 * GIB) is None


def rehearsed(device_bytes: int | None) -> Rehearsed:
    return Rehearsed(
        micro_batch_size=2,
        longest_row_tokens=2048,
        seconds=12,
        device_allocated_bytes=device_bytes,
        device_reserved_bytes=device_bytes,
    )


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            TrainingResumed(step=200, num_steps=1000, checkpoint=Path("runs/x/checkpoints/step-200")),
            "Resuming at step 200 of 1,000 from runs/x/checkpoints/step-200",
        ),
        (
            TrainingResumed(step=0, num_steps=1000, checkpoint=Path("runs/x")),
            "Starting over in runs/x: the earlier run left no checkpoint",
        ),
        (
            rehearsed(7 * GIB),
            "largest micro-batch (2 rows of 2,048 tokens) fits: 7.00 GiB allocated, 7.00 GiB reserved, took 12 s",
        ),
        (rehearsed(None), "largest micro-batch (2 rows of 2,048 tokens) tried, took 12 s"),
        (
            StepSkipped(step=7, reason="the loss is nan", rows=("a.jsonl:1", "a.jsonl:2")),
            "warning: step 7 skipped: the loss is nan; its rows: a.jsonl:1, a.jsonl:2",
        ),
        (
            StepSkipped(step=7, reason="the loss is nan", rows=tuple(f"a:{row}\x1b" for row in range(1002))),
            "warning: step 7 skipped: the loss is nan; its rows: a:0[U+001B], a:1[U+001B], a:2[U+001B] and 999 more",
        ),
        (StepSkipped(step=7, reason="the loss is nan", rows=()), "warning: step 7 skipped: the loss is nan"),
        (EvalDone(step=3, loss=1.5, seconds=2, is_best=False), "step 3: held-out loss 1.5000 (2.00 s)"),
        (EvalDone(step=3, loss=float("nan"), seconds=2, is_best=False), "step 3: held-out loss nan (2.00 s)"),
        (
            SampleDone(step=5, prompt=" What is it?\nSay.", answer="A \x1b[31mred\x1b[0m\tthing.\n"),
            "step 5: sample: What is it?⏎ Say. -> A [U+001B][31mred[U+001B][0m→thing.",
        ),
        (SampleDone(step=0, prompt="p", answer="\n"), "step 0: sample: p -> (empty)"),
        (SampleDone(step=0, prompt="p", answer="1\n2\n3\n4\n5\n6"), "step 0: sample: p -> 1⏎ 2⏎ 3⏎ 4 …"),
        (SampleDone(step=0, prompt="p", answer="x" * 10**6), f"step 0: sample: p -> {'x' * 300} …"),
    ],
)
def test_an_event_is_one_plain_line(event: Event, line: str) -> None:
    assert describe_event(event) == line
    file = io.StringIO()
    PlainReporter(file).report(event)
    assert file.getvalue() == line + "\n"


def test_a_log_ends_with_the_curve_of_the_loss() -> None:
    file = io.StringIO()
    reporter = PlainReporter(file)
    for number in range(1, 11):
        reporter.report(step(number))
    reporter.report(TrainingEnded(step=10, num_steps=10, interrupted_by=None))
    assert file.getvalue().splitlines()[-1] == "losses ██▇▆▅▄▃▂▁▁  0 to 4.5"


def test_an_encoding_without_blocks_gets_no_curve() -> None:
    raw = io.BytesIO()
    reporter = PlainReporter(io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    for number in range(1, 11):
        reporter.report(step(number))
    reporter.report(TrainingEnded(step=10, num_steps=10, interrupted_by=None))
    lines = raw.getvalue().decode("ascii").splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "10/10"]


def test_the_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    state = RunState()
    state.update(TrainingResumed(step=5, num_steps=10, checkpoint=Path("step-5")), 0.0)
    assert state.step == 5
    state.update(step(6), 1.0)
    assert state.seconds_left is None  # the time of that step is unknown
    state.update(step(8), 2.0)  # a second a step, by `step`
    assert state.seconds_left == 2.0


def test_the_state_follows_the_events() -> None:
    state = RunState()
    state.update(TrainingStarted(num_steps=10, output=Path("run")), 0.0)
    state.update(EvalStarted(step=1), 0.0)
    assert state.status == "Evaluating …"
    state.update(EvalDone(step=1, loss=1.0, seconds=1, is_best=True), 0.0)
    assert state.status == "Training 10 steps"
    state.update(EvalDone(step=2, loss=2.0, seconds=1, is_best=False), 0.0)
    assert state.last_eval is not None
    assert state.best_eval is not None
    assert (state.last_eval.step, state.best_eval.step) == (2, 1)
    state.update(StepSkipped(step=3, reason="nan", rows=()), 0.0)
    assert (state.step, state.num_skipped) == (3, 1)


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(0.9, "0s ago"), (59.9, "59s ago"), (200, "3m ago"), (7500, "2h 5m ago"), (100_000, "1d 3h ago")],
)
def test_ages_are_shown_in_whole_units(seconds: float, age: str) -> None:
    assert describe_age(seconds) == age


def test_reporting_a_step_is_fast_and_stores_little() -> None:
    live = LiveReporter(Console(file=io.StringIO(), force_terminal=True, width=100))
    live.report(TrainingStarted(num_steps=100_000, output=Path("run")))
    seconds = []
    for number in range(1, 20_001):
        event = step(number, of=100_000)
        start = time.perf_counter()
        live.report(event)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 100e-6
    assert len(pickle.dumps(vars(live)["_state"])) < 20_000


def test_the_time_left_is_predicted_until_steps_were_measured() -> None:
    state = RunState()
    state.update(TrainingStarted(num_steps=10, output=Path("run"), predicted_step_seconds=3.0), 0.0)
    assert state.seconds_left == 30.0
    state.update(TrainingResumed(step=4, num_steps=10, checkpoint=Path("step-4")), 0.0)
    assert state.seconds_left == 18.0
    state.update(step(5), 1.0)
    assert state.seconds_left == 15.0
    state.update(step(7), 2.0)  # a second a step, by `step`
    assert state.seconds_left == 3.0


def test_imports_are_announced_once_and_what_they_make_is_never_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "torch", sys)  # whatever it is
    frozen = gc.get_freeze_count()
    with importing(recorder):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    monkeypatch.delitem(sys.modules, "torch")
    with importing(recorder):
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)
    assert recorder.events == [IMPORTING]
