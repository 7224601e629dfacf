"""The progress of a run on a terminal: bars and figures below, notes above, at any width."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.cli.progress.live_lines import flow, memory_bar
from qlora_cli.events import (
    BytesDone,
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    MemoryUse,
    Noted,
    Rehearsed,
    SampleDone,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
)

GIB = 1024**3
GPU = MemoryUse(
    host_bytes=GIB, device_allocated_bytes=6 * GIB, device_reserved_bytes=7 * GIB, device_total_bytes=24 * GIB
)
STARTED = TrainingStarted(
    num_steps=1_000_000,
    num_epochs=3.0,
    output=Path("runs/a-name-that-is-long-enough-for-any-terminal"),
    predicted_allocated_bytes=6 * GIB,
    predicted_reserved_bytes=8 * GIB,
)


class Screen:
    """A reporter, and its current display and previous output."""

    def __init__(self, width: int, *, encoding: str = "utf-8") -> None:
        self._raw = io.BytesIO()
        file = io.TextIOWrapper(self._raw, encoding=encoding, errors="backslashreplace", write_through=True)
        self.console = Console(file=file, force_terminal=True, width=width, height=60, highlight=False)
        self.reporter = LiveReporter(self.console)
        self.report = self.reporter.report

    def written(self) -> str:
        return Text.from_ansi(self._raw.getvalue().decode()).plain

    def styled(self) -> str:
        return self._raw.getvalue().decode()

    def lines(self) -> list[str]:
        with self.console.capture() as capture:
            self.console.print(self.reporter.live.get_renderable())
        return Text.from_ansi(capture.get()).plain.rstrip("\n").split("\n")


def step(number: int, loss: float, *, of: int = 1_000_000, memory: MemoryUse = GPU) -> StepDone:
    return StepDone(
        step=number,
        num_steps=of,
        epoch=number / of,
        loss=loss,
        learning_rate=2e-4,
        grad_norm=0.5,
        num_tokens=100 * number,
        tokens_per_second=1234.5,
        elapsed_seconds=float(number),
        memory=memory,
    )


def busy_screen(width: int, *, encoding: str = "utf-8") -> Screen:
    """Return a screen in the middle of a run that has everything to show."""
    screen = Screen(width, encoding=encoding)
    screen.report(STARTED)
    screen.report(TrainingResumed(step=800_000, num_steps=1_000_000, checkpoint=Path("run/checkpoints/step-800000")))
    for number in range(1, 301):
        screen.report(step(800_000 + number, 5 - number / 100))
    screen.report(EvalDone(step=800_200, loss=1.25, seconds=3, is_best=True))
    screen.report(EvalDone(step=800_300, loss=1.5, seconds=3, is_best=False))
    screen.report(StepSkipped(step=800_301, reason="the loss is nan", rows=("a:1",)))
    screen.report(CheckpointSaved(step=800_300, path=Path("run/checkpoints/step-800300")))
    return screen


def test_the_live_display_shows_progress_loss_rate_and_memory() -> None:
    file = io.StringIO()
    reporter = LiveReporter(Console(file=file, force_terminal=True, width=100, highlight=False))
    with reporter.live:
        reporter.report(TrainingStarted(num_steps=10, output=Path("run")))
        reporter.report(Noted(message="something was cut", level="warning"))
        reporter.report(step(1, 4.5, of=10))
        reporter.report(step(2, 4.0, of=10))
        reporter.live.refresh()
    shown = file.getvalue()
    for expected in (
        "2/10",
        "loss 4.2368  ",
        "lr 2.00e-04",
        "grad 0.500",
        "1,234 tok/s",
        "VRAM 6.00 allocated",
        "ETA",
    ):
        assert expected in shown
    assert "something was cut" in shown
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back


def test_a_busy_run_on_a_wide_terminal() -> None:
    status, bar, *lines = busy_screen(120).lines()
    assert status == "runs/a-name-that-is-long-enough-for-any-terminal  Training 1,000,000 steps"
    assert bar.startswith("step  800301/1000000 ━")
    assert " 80 % 0:00:0" in bar
    figures, losses, held_out, memory, history = lines
    assert figures == "loss 2.0900 ↓  lr 2.00e-04  grad 0.500  1,234 tok/s  epoch 0.80 of 3.00"
    assert losses.startswith("losses █")
    assert losses.endswith("▁  2 to 4.99")
    assert len(losses) == 120
    assert held_out == "held-out 1.5000 at step 800,300  best 1.2500 at step 800,200"
    assert memory == (
        "VRAM 6.00 allocated / 7.00 reserved of 24.00 GiB  predicted 8.00 (+14.3 %)  ████████▒░░│░░░░░░░░░░░░░░░░░░░░"
    )
    assert history == "checkpoint step 800,300, 0s ago  1 step skipped  resumed at step 800,000"


@pytest.mark.parametrize("width", [40, 50, 80, 120, 300])
def test_no_line_is_wrapped_at_any_width(width: int) -> None:
    lines = busy_screen(width).lines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= 12
    assert lines[0].startswith("runs/a-")
    assert "  Training 1,000,0" in lines[0]
    assert lines[1].startswith("step  800301/1000000 ")
    shown = "\n".join(lines)
    for expected in ("ETA", "loss 2.0900 ↓", "losses █", "held-out 1.5000", "VRAM 6.00", "predicted 8.00", "skipped"):
        assert expected in shown


def test_a_narrow_terminal_omits_words_not_figures() -> None:
    lines = busy_screen(40).lines()
    assert lines[0] == "runs/a-nam…-terminal  Training 1,000,00…"
    assert "VRAM 6.00 / 7.00 of 24.00 GiB" in lines
    assert "best 1.2500 at step 800,200" in lines
    assert "checkpoint step 800,300, 0s ago" in lines


def test_a_terminal_without_blocks_gets_figures_without_curve_and_bar() -> None:
    shown = "\n".join(busy_screen(120, encoding="latin-1").lines())
    assert "losses" not in shown
    assert "█" not in shown
    assert "predicted 8.00 (+14.3 %)" in shown


def test_the_age_of_the_checkpoint_grows_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("qlora_cli.cli.progress.live_display.time.monotonic", lambda: now)
    screen = busy_screen(80)
    assert screen.lines()[-1].startswith("checkpoint step 800,300, 0s ago")
    now += 185
    assert screen.lines()[-1].startswith("checkpoint step 800,300, 3m ago")


def test_losses_that_are_not_finite_are_marked_without_harm() -> None:
    screen = Screen(80)
    screen.report(STARTED)
    for number, loss in enumerate((4.0, float("nan"), float("inf"), 2.0), start=1):
        screen.report(step(number, loss))
    assert "losses █xx▁  2 to 4" in screen.lines()
    screen.report(step(5, float("nan")))
    screen.report(EvalDone(step=5, loss=float("nan"), seconds=1, is_best=False))
    lines = screen.lines()
    assert "held-out nan at step 5" in lines
    assert any(line.startswith("loss nan") for line in lines)


def test_a_run_without_gpu_shows_the_memory_of_the_process() -> None:
    screen = Screen(80)
    screen.report(TrainingStarted(num_steps=10, output=Path("run")))
    screen.report(step(1, 4.0, of=10, memory=MemoryUse(host_bytes=3 * GIB)))
    assert screen.lines()[-1] == "memory 3.00 GiB resident"


def test_the_display_shows_training_again_after_an_evaluation() -> None:
    screen = Screen(80)
    screen.report(TrainingStarted(num_steps=10, output=Path("run")))
    screen.report(EvalStarted(step=5))
    assert screen.lines()[0] == "run  Evaluating …"
    screen.report(EvalDone(step=5, loss=1.0, seconds=1, is_best=True))
    assert screen.lines()[0] == "run  Training 10 steps"
    assert "held-out 1.0000 at step 5 (best)" in screen.lines()


def test_notes_scroll_above_in_the_style_of_their_level() -> None:
    screen = Screen(100)
    screen.report(TrainingResumed(step=200, num_steps=1000, checkpoint=Path("run/checkpoints/step-200")))
    screen.report(StepSkipped(step=201, reason="the loss is nan", rows=("a:1",)))
    screen.report(EvalDone(step=205, loss=1.0, seconds=1, is_best=True))
    screen.report(
        Rehearsed(
            micro_batch_size=1,
            longest_row_tokens=9,
            seconds=1,
            device_allocated_bytes=None,
            device_reserved_bytes=None,
        )
    )
    assert screen.written().splitlines() == [
        "Resuming at step 200 of 1,000 from run/checkpoints/step-200",
        "warning: step 201 skipped: the loss is nan; its rows: a:1",
        "step 205: held-out loss 1.0000, best so far (1.00 s)",
        "largest micro-batch (1 row of 9 tokens) tried, took 1.00 s",
    ]
    resumed, skipped, *_ = screen.styled().splitlines()
    assert resumed.startswith("\x1b[1;36m")
    assert skipped.startswith("\x1b[33m")


def test_a_sample_is_shown_in_two_columns_with_control_characters_escaped() -> None:
    screen = Screen(40)
    screen.report(SampleDone(step=5, prompt="What is it?\nSay.", answer="A \x1b[31mred\x1b[0m thing " + "x" * 40))
    assert "\x1b[31mred" not in screen.styled()
    assert [line.rstrip() for line in screen.written().splitlines()] == [
        "step 5: sample",
        "  prompt  What is it?⏎",
        "          Say.",
        "  answer  A [U+001B][31mred[U+001B][0m",
        "          thing",
        "          xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "          xxxxxxxxxx",
    ]


def test_the_curve_of_the_loss_stays_on_the_terminal() -> None:
    screen = Screen(80)
    screen.report(TrainingStarted(num_steps=3, output=Path("run")))
    for number, loss in enumerate((4.0, 3.0, 2.0), start=1):
        screen.report(step(number, loss, of=3))
    screen.report(TrainingEnded(step=2, num_steps=3, interrupted_by="SIGTERM"))
    assert screen.written().splitlines() == [
        "losses █▅▁  2 to 4",
        "Stopped by SIGTERM after step 2 of 3; the same command resumes there",
    ]


def test_the_live_display_has_a_bar_for_each_transfer_until_it_is_complete() -> None:
    screen = Screen(100)
    screen.report(BytesDone(kind="download", done_bytes=GIB, total_bytes=4 * GIB))
    screen.report(BytesDone(kind="quantize", done_bytes=GIB, total_bytes=2 * GIB))
    _, download, quantize = screen.lines()
    for line, expected in (
        (download, ("Downloading", "1.0/4.0 GiB", "━", "ETA")),
        (quantize, ("Quantizing", "1.0/2.0 GiB")),
    ):
        assert all(part in line for part in expected)
    screen.report(BytesDone(kind="download", done_bytes=4 * GIB, total_bytes=4 * GIB))
    _, one = screen.lines()
    assert "Quantizing" in one
    screen.report(BytesDone(kind="quantize", done_bytes=2 * GIB, total_bytes=2 * GIB))
    assert len(screen.lines()) == 1


def test_a_transfer_fits_a_narrow_terminal() -> None:
    screen = Screen(40)
    screen.report(BytesDone(kind="download", done_bytes=100 * GIB, total_bytes=140 * GIB))
    _, download = screen.lines()
    assert download.split()[:3] == ["Downloading", "100.0/140.0", "GiB"]


def test_parts_wrap_onto_the_next_line_unbroken() -> None:
    assert [line.plain for line in flow(["aaa", "bb", "cccc"], 7)] == ["aaa  bb", "cccc"]
    assert flow([], 7) == []


@pytest.mark.parametrize(
    ("allocated", "reserved", "predicted", "bar"),
    [
        (0, 0, None, "░░░░░░░░░░░░"),
        (6, 12, None, "███▒▒▒░░░░░░"),
        (6, 12, 14, "███▒▒▒░│░░░░"),
        (6, 12, 8, "███▒│▒░░░░░░"),
        (24, 24, 40, "███████████│"),
    ],
)
def test_the_memory_bar_shows_allocated_reserved_and_predicted_memory(
    allocated: int, reserved: int, predicted: int | None, bar: str
) -> None:
    memory = MemoryUse(
        host_bytes=0,
        device_allocated_bytes=allocated * GIB,
        device_reserved_bytes=reserved * GIB,
        device_total_bytes=24 * GIB,
    )
    assert memory_bar(memory, predicted * GIB if predicted else None, 12) == bar
