"""What a run looks like: plain lines without a terminal, a live display on one."""

import io
from pathlib import Path
from typing import get_args, get_type_hints

from rich.console import Console

from qlora_cli.cli.progress import TRANSFERS, Direction, LiveReporter, PlainReporter, Transfer, describe_memory
from qlora_cli.events import (
    BytesDone,
    CheckpointSaved,
    EvalDone,
    MemoryUse,
    Noted,
    PhaseStarted,
    StepDone,
    TrainingEnded,
    TrainingStarted,
)

GIB = 1024**3
GPU = MemoryUse(
    host_bytes=GIB, device_allocated_bytes=6 * GIB, device_reserved_bytes=7 * GIB, device_total_bytes=24 * GIB
)


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


def test_plain_lines_are_the_first_the_last_and_one_an_interval() -> None:
    file = io.StringIO()
    reporter = PlainReporter(file, interval_seconds=1000)
    reporter.report(PhaseStarted(title="Loading"))
    reporter.report(TrainingStarted(num_steps=10, output=Path("run")))
    for number in range(1, 11):
        reporter.report(step(number))
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["Loading …", "Training 10 steps into run"]
    assert [line.split()[1] for line in lines[2:]] == ["1/10", "10/10"]
    assert "loss 0.0000 ↓" in lines[-1]
    assert "VRAM 6.00 GiB allocated / 7.00 GiB reserved / of 24.00 GiB" in lines[-1]
    assert "\x1b" not in file.getvalue()
    every = io.StringIO()
    eager = PlainReporter(every, interval_seconds=0)
    for number in range(1, 11):
        eager.report(step(number))
    assert len(every.getvalue().splitlines()) == 10


def test_plain_lines_for_everything_else() -> None:
    file = io.StringIO()
    reporter = PlainReporter(file)
    reporter.report(Noted(message="cut", level="warning"))
    reporter.report(EvalDone(step=3, loss=1.5, seconds=2))
    reporter.report(CheckpointSaved(step=3, path=Path("run/checkpoints/step-3")))
    reporter.report(TrainingEnded(step=3, num_steps=9, interrupted_by="SIGTERM"))
    assert file.getvalue().splitlines() == [
        "warning: cut",
        "step 3: held-out loss 1.5000 (2.00 s)",
        "step 3: checkpoint run/checkpoints/step-3",
        "Stopped by SIGTERM after step 3 of 9",
    ]


def test_the_live_display_shows_progress_loss_rate_and_memory() -> None:
    file = io.StringIO()
    reporter = LiveReporter(Console(file=file, force_terminal=True, width=100, highlight=False))
    with reporter.live:
        reporter.report(TrainingStarted(num_steps=10, output=Path("run")))
        reporter.report(Noted(message="something was cut", level="warning"))
        reporter.report(step(1))
        reporter.report(step(2))
        reporter.live.refresh()
    shown = file.getvalue()
    for expected in ("2/10", "loss 4.0000 ↓", "lr 2.00e-04", "grad 0.500", "1,234 tok/s", "VRAM 6.00 GiB", "ETA"):
        assert expected in shown
    assert "something was cut" in shown
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back


def downloaded(done_bytes: int, total_bytes: int = 4 * GIB) -> BytesDone:
    return BytesDone(kind="download", done_bytes=done_bytes, total_bytes=total_bytes)


def test_plain_lines_of_a_transfer_are_the_first_the_last_and_one_an_interval() -> None:
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


def test_speed_and_time_left_count_from_where_a_resumed_transfer_began() -> None:
    transfer = Transfer(started=100.0, first_bytes=GIB)
    assert transfer.describe(downloaded(2 * GIB), 120.0).endswith("2.00 GiB of 4.00 GiB (50%), 51.20 MiB/s, 40 s left")
    assert transfer.describe_end(downloaded(4 * GIB), 160.0) == "4.00 GiB downloaded in 1:00 (51.20 MiB/s)"
    assert transfer.describe_end(downloaded(4 * GIB), 100.0) == "4.00 GiB downloaded"


def test_an_empty_transfer_is_not_worth_a_line() -> None:
    file = io.StringIO()
    PlainReporter(file).report(downloaded(0, 0))
    assert file.getvalue() == ""


def test_the_live_display_has_a_bar_for_each_transfer_until_it_is_complete() -> None:
    file = io.StringIO()
    reporter = LiveReporter(Console(file=file, force_terminal=True, width=100, highlight=False))

    def shown() -> str:
        before = file.tell()
        reporter.live.refresh()
        file.seek(before)
        return file.read()

    with reporter.live:
        reporter.report(downloaded(GIB))
        reporter.report(BytesDone(kind="quantize", done_bytes=GIB, total_bytes=2 * GIB))
        both = shown()
        for expected in ("Downloading", "1.0/4.0 GiB", "Quantizing", "1.0/2.0 GiB", "ETA"):
            assert expected in both
        reporter.report(downloaded(4 * GIB))
        one = shown()
        assert "Downloading" not in one
        assert "Quantizing" in one
        reporter.report(BytesDone(kind="quantize", done_bytes=2 * GIB, total_bytes=2 * GIB))
        assert "GiB" not in shown()


def test_every_kind_of_transfer_has_its_words() -> None:
    kinds = get_args(get_type_hints(BytesDone)["kind"])
    assert set(kinds) == set(TRANSFERS)
    for kind in kinds:
        file = io.StringIO()
        PlainReporter(file).report(BytesDone(kind=kind, done_bytes=1, total_bytes=2))
        assert file.getvalue().startswith(TRANSFERS[kind][0])


def test_memory_on_a_cpu_is_that_of_the_process() -> None:
    assert describe_memory(MemoryUse(host_bytes=3 * GIB)) == "memory 3.00 GiB resident"


def test_direction_follows_the_trend() -> None:
    direction = Direction()
    assert [direction.update(value) for value in (4.0, 3.0, 3.9, 5.0)] == [" ", "↓", "→", "↑"]
