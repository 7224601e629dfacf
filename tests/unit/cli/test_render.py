"""Reporting that must not disturb a run, and readable results."""

import errno
import io
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from qlora_cli.cli.progress.live_display import LiveReporter
from qlora_cli.cli.progress.plain_lines import PlainReporter
from qlora_cli.cli.progress.reporters import reporting
from qlora_cli.cli.rendering.load_text import bars, errors_by_layer, render_load
from qlora_cli.cli.rendering.training_text import render_plan, render_training
from qlora_cli.cli.volume import Volume
from qlora_cli.events import MemoryUse, Noted, StepDone, TrainingEnded, TrainingStarted
from qlora_cli.quantization.load_report import KindCount, LoadReport, WeightError
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.record import read_record
from qlora_cli.runs.run_result import PredictedTime, TrainPlan, TrainResult
from tests.support.runs.run_directories import a_record, write_run

STEP = StepDone(
    step=9,
    num_steps=100,
    epoch=0.09,
    loss=1.0,
    learning_rate=2e-4,
    grad_norm=0.5,
    num_tokens=100,
    tokens_per_second=50.0,
    elapsed_seconds=360.0,
    memory=MemoryUse(host_bytes=1024**3),
)
REPORT = LoadReport(
    model="base",
    base_model="base",
    revision=None,
    commit=None,
    adapter=None,
    architecture="LlamaForCausalLM",
    device="cpu",
    quantization="nf4",
    quantization_settings={"double_quant": True},
    storage="NF4, double quantization",
    prequantized=False,
    num_parameters=1000,
    num_quantized_parameters=800,
    bits_per_quantized_parameter=4.5,
    total_bytes=1250,
    quantized_weight_bytes=400,
    quantization_constant_bytes=50,
    unquantized_bytes=800,
    float32_bytes=4000,
    float16_bytes=2000,
    unquantized_fits=False,
    unquantized_model_bytes=4000,
    kinds=(
        KindCount(kind="linear layers", why_not_quantized=None, num_weights=4, num_parameters=800, num_bytes=450),
        KindCount(kind="embedding", why_not_quantized="looked up", num_weights=1, num_parameters=200, num_bytes=800),
    ),
    dtype_bytes={"uint8": 400, "float32": 800},
    errors=None,
    compute_dtype="fp32",
    compute_dtype_reason="no native bf16",
    load_seconds=0.5,
    peak_host_bytes=4096,
    peak_device_bytes=None,
    saved=None,
    saved_bytes=None,
    notes=(),
)
PLAN = TrainPlan(
    model="base",
    output=Path("run"),
    device="cpu",
    quantization="nf4",
    compute_dtype="fp32",
    compute_dtype_reason="no native bf16",
    attention="sdpa",
    gradient_checkpointing="off",
    optimizer="adamw_torch",
    num_parameters=1000,
    num_trainable_parameters=100,
    data_format="messages",
    num_packed_rows=None,
    padding_share=0.25,
    num_train_rows=12,
    num_eval_rows=None,
    num_train_tokens=600,
    num_supervised_tokens=200,
    longest_row_tokens=80,
    num_truncated_rows=0,
    num_dropped_rows=0,
    num_lost_supervised_tokens=0,
    micro_batch_size=2,
    gradient_accumulation_steps=3,
    num_devices=1,
    examples_per_step=6,
    num_steps=2,
    save_steps=1,
    num_epochs=1.0,
    adapter_bytes=400,
    optimizer_bytes=800,
    checkpoint_bytes=1600,
    predicted_memory=None,
    disk_bytes=2000,
)


def test_slow_steps_have_an_eta() -> None:
    file = io.StringIO()
    reporter = LiveReporter(Console(file=file, force_terminal=True, width=80, highlight=False))
    with reporter.live:
        reporter.report(TrainingStarted(num_steps=100, output=Path("run")))
        reporter.report(STEP)  # 40 seconds a step, 91 to go
        reporter.live.refresh()
    assert "ETA 1:00:40" in file.getvalue()


def test_the_cursor_is_restored_when_a_run_fails() -> None:
    file = io.StringIO()
    reporter = LiveReporter(Console(file=file, force_terminal=True, width=80))
    with pytest.raises(ZeroDivisionError), reporter.live:
        raise ZeroDivisionError
    shown = file.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_a_log_that_cannot_be_written_does_not_end_a_run() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w", buffering=1) as file:  # noqa: PTH123 - a descriptor, not a path
        reporter = PlainReporter(file, interval_seconds=0)
        reporter.report(Noted(message="nobody reads this"))
        reporter.report(STEP)
        os.dup2(os.open(os.devnull, os.O_WRONLY), write_end)  # so that closing does not complain


def test_output_of_trackers_during_a_run_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting():
        print("view the run at http://localhost")
    print("result")
    shown = capsys.readouterr()
    assert shown.out == "result\n"
    assert shown.err == "view the run at http://localhost\n"


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with reporting() as reporter:
        reporter.report(Noted(message="hello"))
    assert isinstance(reporter, PlainReporter)
    assert terminal.getvalue() == "hello\n"


def test_quiet_writes_warnings_only_and_verbose_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    warning = Noted(level="warning", message="rows are lost")
    stopped = TrainingEnded(step=3, num_steps=9, interrupted_by="SIGINT")
    events = (Noted(message="hello"), replace(STEP, step=50), replace(STEP, step=51), warning, stopped)
    shown = {}
    for volume in Volume:
        with reporting(volume) as reporter:
            for event in events:
                reporter.report(event)
        shown[volume] = capsys.readouterr().err
    end = "Stopped by SIGINT after step 3 of 9; the same command resumes there"
    assert shown[Volume.QUIET].splitlines() == ["warning: rows are lost", end]
    assert [shown[volume].count("step 5") for volume in (Volume.NORMAL, Volume.VERBOSE)] == [1, 2]
    assert all("hello" in shown[volume] and end in shown[volume] for volume in (Volume.NORMAL, Volume.VERBOSE))


def test_a_closed_stderr_is_not_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after `2>&-`
    with reporting() as reporter:
        print("a tracker's line")
        reporter.report(Noted(message="nobody reads this"))
        reporter.report(STEP)
    print("result")
    assert capsys.readouterr().out == "result\n"


def test_a_terminal_that_disappears_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()

    def hang_up(_: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with reporting() as reporter:
        assert isinstance(reporter, LiveReporter)
        monkeypatch.setattr(terminal, "write", hang_up)
        reporter.report(TrainingStarted(num_steps=100, output=Path("run")))
        reporter.report(Noted(message="nobody reads this"))
        reporter.report(STEP)
        reporter.live.refresh()


def test_progress_shows_no_token() -> None:
    token = "hf_" + "a1B2" * 6
    plain, live = io.StringIO(), io.StringIO()
    PlainReporter(plain).report(Noted(message=f"got {token}"))
    reporter = LiveReporter(Console(file=live, force_terminal=True, width=80))
    with reporter.live:
        reporter.report(Noted(message=f"got {token}"))
    for shown in (plain.getvalue(), live.getvalue()):
        assert token not in shown
        assert "hf_***" in shown


def test_load_reports_how_much_smaller_the_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    render_load(REPORT)
    shown = capsys.readouterr().out
    assert "3.20x smaller" in shown
    assert "1.60x smaller" in shown
    assert "4.50 bits a parameter" in shown
    assert "GPU" not in shown
    render_load(replace(REPORT, peak_device_bytes=1024))
    assert "peak GPU memory" in capsys.readouterr().out


def test_load_reports_what_is_not_quantized_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    render_load(REPORT)
    shown = capsys.readouterr().out.splitlines()
    assert "  linear layers  4  800  450 B   4.50 bits  quantized" in shown
    assert "  embedding      1  200  800 B  32.00 bits  looked up" in shown


def test_load_advises_against_quantizing_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    render_load(REPORT)
    assert "--quant none" not in capsys.readouterr().out
    render_load(replace(REPORT, unquantized_fits=True))
    assert "--quant none is exact and faster" in capsys.readouterr().out


def test_errors_are_drawn_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    errors = (
        WeightError(name="model.layers.10.up.weight", relative_rms=0.04),
        WeightError(name="model.layers.2.up.weight", relative_rms=0.08),
        WeightError(name="model.layers.2.down.weight", relative_rms=0.04),
    )
    assert errors_by_layer(errors) == pytest.approx([0.06, 0.04])
    assert bars([0.06, 0.03, 0.0]) == "█▅▁"
    assert bars([0.09, 0.0896, 0.0892]) == "█▅▁"
    assert bars([0.09, 0.09]) == "▁▁"
    assert len(bars([0.1] * 1000)) <= 64
    render_load(replace(REPORT, errors=errors))
    shown = capsys.readouterr().out
    assert "8.00%  model.layers.2.up.weight" in shown
    assert "from 4.00% to 6.00%" in shown


def test_the_plan_shows_the_batch_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    render_plan(PLAN)
    shown = capsys.readouterr().out
    assert "2 micro-batch x 3 accumulation x 1 device = 6 examples a step" in shown
    assert "\x1b" not in shown


def test_the_plan_shows_filled_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    render_plan(replace(PLAN, micro_batch_tokens=4096, padding_share=0.0))
    shown = capsys.readouterr().out
    assert "6 examples a step in micro-batches of up to 4,096 tokens" in shown
    assert "none: the rows of a micro-batch are joined" in shown
    assert "accumulation" not in shown


def test_the_time_of_a_step_is_shown_with_its_prediction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    predicted = PredictedTime(step_seconds=2.2, step_seconds_low=1.65, step_seconds_high=2.86, rates="data sheet")
    render_plan(replace(PLAN, predicted_time=predicted))
    assert "2.20 s predicted (1.65 s to 2.86 s; rates data sheet)" in capsys.readouterr().out
    for time, expected in ((asdict(predicted), "2.00 s (2.20 s predicted, +10 %; rates data sheet)"), (None, None)):
        record = a_record(result={"steps": 11, "step_seconds": 2.0, "predicted_time": time})
        run = write_run(tmp_path / str(expected is None), record=record)
        result = TrainResult.of_run(RunDirectory(run), read_record(run))
        assert result is not None
        render_training(result)
        shown = capsys.readouterr().out
        assert "a step" not in shown if expected is None else expected in shown
