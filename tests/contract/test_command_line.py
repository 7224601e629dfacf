"""What scripts rely on: exit codes, one JSON object, messages, flags, and an answer without torch."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tokenizers import decoders
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.demo.demonstration import DEMO_SETTINGS
from qlora_cli.quantization.load_report import LoadReport
from qlora_cli.runs.checkpoints import damage_of
from qlora_cli.runs.run_result import TrainPlan, TrainResult
from qlora_cli.settings.files.preset_files import preset_file
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.conftest import RunQlora, write_jsonl
from tests.support.processes.forks import end_of, start_command, start_on_terminal
from tests.support.processes.light_commands import LightQlora

TRAIN_FLAGS = (
    *("--model", "--dataset", "--output", "--config", "--set", "--quant", "--dtype", "--rank", "--alpha"),
    *("--target-modules", "--learning-rate", "--epochs", "--max-steps", "--micro-batch-size", "--max-length"),
    *("--gradient-accumulation-steps", "--gradient-checkpointing", "--attention", "--optimizer", "--seed"),
    *("--eval-dataset", "--report-to", "--dry-run", "--json"),
)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["config", "schema"], 0),
        (["config", "show", "--rank", "3"], 0),
        (["trian"], 2),
        (["train", "--lerning-rate", "1"], 2),
        (["train", "--rank", "-1", "--quant", "nf5"], 2),
        (["train", "--model", "./no", "--dataset", "no.jsonl", "--output", "run"], 2),
        (["train", "--config", "no.yaml"], 2),
        (["load"], 2),
        (["load", "./no"], 2),
    ],
)
def test_help_and_every_usage_or_settings_error_answer_without_torch(
    light_qlora: LightQlora, arguments: list[str], code: int
) -> None:
    done = light_qlora(*arguments)
    assert (done.code, done.heavy) == (code, [])
    assert "Traceback" not in done.stderr


def test_version_and_module_entry(run_qlora: RunQlora) -> None:
    done = run_qlora("--version")
    assert (done.code, done.stdout, done.stderr) == (0, "qlora 0.1.0\n", "")


def test_train_has_every_promised_flag(run_qlora: RunQlora) -> None:
    shown = run_qlora("train", "--help").stdout
    assert [flag for flag in TRAIN_FLAGS if f" {flag} " not in shown.replace("\n", " ") + " "] == []


def test_all_problems_at_once_with_hints_on_stderr_only(run_qlora: RunQlora, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("training:\n  optimizer: adamw_toch\n")
    done = run_qlora("train", "--config", config, "--rank", "0", "--set", "lora.alpa=1", "--learning-rate", "-1")
    assert (done.code, done.stdout) == (2, "")
    for expected in (
        f"{config}:2 training.optimizer: 'adamw_toch'",
        "Did you mean adamw_torch?",
        "--rank: must be greater than or equal to 1, got '0'",
        "--learning-rate: must be greater than 0",
        "Did you mean alpha?",
        "--model: is missing",
        "--dataset: is missing",
        "--output: is missing",
    ):
        assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--micro-batchsize", "1"], "Did you mean --micro-batch-size?"),
        (["laod", "x"], "Did you mean 'load'?"),
        (["train", "--quant", "nf"], "Did you mean nf4?"),
        (["load"], "error: MODEL: is missing"),
    ],
)
def test_misspellings_get_a_suggestion(run_qlora: RunQlora, arguments: list[str], expected: str) -> None:
    done = run_qlora(*arguments)
    assert done.code == 2
    assert expected in done.stderr


def test_an_error_with_json_is_one_object(run_qlora: RunQlora) -> None:
    done = run_qlora("train", "--rank", "x", "--json")
    assert done.code == 2
    error = done.json["error"]
    assert error["type"] == "SettingsError"
    assert error["exit_code"] == 2
    assert {problem["where"] for problem in error["problems"]} >= {"--rank", "--model"}


def test_tokens_are_never_printed(run_qlora: RunQlora) -> None:
    token = "hf_" + "a1B2" * 6
    done = run_qlora("load", f"./{token}", env={"HF_TOKEN": token})
    assert done.code == 2
    assert token not in done.stderr + done.stdout
    assert "***" in done.stderr


def test_a_bug_of_ours_shows_a_traceback_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret-token")

    monkeypatch.setattr("qlora_cli.settings.resolve.describe", broken)
    done = CliRunner().invoke(app, ["config", "show"])
    assert done.exit_code == 1
    assert "ZeroDivisionError: ***" in done.output
    assert "This is a bug in qlora" in done.output
    assert "secret-token" not in done.output


def test_a_panic_of_a_library_is_one_message_and_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*_: object) -> None:
        decoders.Strip("a", 9, 9).decode(["a"])

    monkeypatch.setattr("qlora_cli.settings.resolve.describe", panics)
    done = CliRunner().invoke(app, ["config", "show"])
    assert done.exit_code == 2
    assert "error: an input file made a library panic: index out of bounds" in done.output
    assert "tokenizer.json" in done.output
    assert "Traceback" not in done.output


def test_a_traceback_has_at_most_forty_lines_and_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*values: object) -> None:
        for _ in range(2):
            broken([*values])

    monkeypatch.setattr("qlora_cli.settings.resolve.describe", broken)
    done = CliRunner().invoke(app, ["config", "show"])
    lines = done.output.splitlines()
    traceback = lines[: next(number for number, line in enumerate(lines) if line.startswith("error: RecursionError"))]
    assert len(traceback) <= 40
    assert traceback[0].startswith("Traceback")
    assert traceback[-1].startswith("RecursionError")
    assert any("lines left out" in line for line in traceback)


def test_a_traceback_of_a_long_chain_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("\n".join(f"line {number}" for number in range(1000)))

    monkeypatch.setattr("qlora_cli.settings.resolve.describe", broken)
    output = CliRunner().invoke(app, ["config", "show"]).output
    assert output.index("lines left out") < output.index("line 999")
    assert len(output.partition("\nerror: ")[0].splitlines()) == 40


def test_a_closed_pipe_ends_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_cli", "config", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.wait(timeout=300)
    process.stderr.close()
    assert errors == ""


def test_config_show_prints_the_origin_of_each_value(run_qlora: RunQlora, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lora:\n  rank: 8\n")
    shown = run_qlora("config", "show", "--config", config, "--alpha", "4", "--json").json
    assert shown["lora.rank"] == {"value": 8, "origin": f"{config}:2"}
    assert shown["lora.alpha"] == {"value": 4.0, "origin": "--alpha"}
    assert shown["lora.dropout"]["origin"] == "default"
    text = run_qlora("config", "show", "--config", config).stdout
    assert f"{config}:2" in text
    assert "\x1b" not in text


def test_load_prints_every_promised_key_and_the_bytes_add_up(run_qlora: RunQlora, base_model: Path) -> None:
    done = run_qlora("load", base_model, "--device", "cpu", "--json")
    assert done.code == 0, done.stderr
    report = done.json
    assert set(report) == {field.name for field in fields(LoadReport)}
    n = report["num_quantized_parameters"]
    assert n == 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 640)
    assert report["quantized_weight_bytes"] == n // 2
    # A byte a block of 64, an fp32 a block of 256 of those; a table of 16 and one of 256, an offset, a layer.
    tables = 28 * 4 * (16 + 256 + 1)
    assert report["quantization_constant_bytes"] == n // 64 + 4 * n // (64 * 256) + tables
    parts = ("quantized_weight_bytes", "quantization_constant_bytes", "unquantized_bytes")
    assert report["total_bytes"] == sum(report[part] for part in parts)
    assert report["float32_bytes"] == 2 * report["float16_bytes"] == 4 * report["num_parameters"]
    assert report["peak_device_bytes"] is None
    assert report["peak_host_bytes"] > report["total_bytes"]
    single = run_qlora("load", base_model, "--device", "cpu", "--no-double-quant", "--json").json
    assert single["quantization_constant_bytes"] == 4 * n // 64 + 28 * 4 * 16


def test_train_ends_with_one_object_and_trains_nothing_twice(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = ["train", "--model", base_model, "--dataset", rows, "--eval-split", "25%", "--output", output]
    arguments += ["--max-steps", "2", "--gradient-accumulation-steps", "2", "--device", "cpu", "--json"]
    plan = run_qlora(*arguments, "--dry-run")
    assert plan.code == 0, plan.stderr
    assert set(plan.json) == {field.name for field in fields(TrainPlan)}
    assert plan.json["examples_per_step"] == 2
    assert not output.exists()
    done = run_qlora(*arguments)
    assert done.code == 0, done.stderr
    assert set(done.json) == {field.name for field in fields(TrainResult)}
    assert done.json["steps"] == 2
    assert done.json["eval_loss"] > 0
    assert done.json["peak_memory"]["host_bytes"] > 0
    assert "step 1/2  loss" in done.stderr
    assert "1 micro-batch x 2 accumulation x 1 device = 2 examples a step; 2 steps" in done.stderr
    assert "\x1b" not in done.stderr
    again = run_qlora(*arguments)
    assert again.code == 0
    assert again.json == done.json
    assert "nothing is left to train" in again.stderr
    never = run_qlora(*arguments, "--resume", "never")
    assert never.code == 2
    assert "already holds a run" in never.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ('{"text": "a"}\n{"text"\n', "row 2 (line 2): broken JSON"),
        ('{"question": "a"}\n', "fit no known format"),
    ],
)
def test_bad_data_leaves_nothing_behind(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path, content: str | None, expected: str
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    done = run_qlora("train", "--model", base_model, "--dataset", data, "--output", tmp_path / "run")
    assert done.code == 2
    assert expected in done.stderr
    assert str(data) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_output_that_holds_something_else_is_refused(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years")
    done = run_qlora("train", "--model", base_model, "--dataset", rows, "--output", precious.parent)
    assert done.code == 2
    assert "contains other files (thesis.txt)" in done.stderr
    assert precious.read_text() == "years"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_with_a_checkpoint(
    base_model: Path, rows: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "run"
    command = ["train", "--model", str(base_model), "--output", str(output)]
    command += ["--dataset", str(rows), "--max-steps", "9999", "--gradient-accumulation-steps", "1", "--json"]
    process = start_command(command, os.environ, tmp_path, streams=tmp_path)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "step_done" in metrics.read_text()):
        assert time.monotonic() < deadline, "no step was made"
        assert process.is_alive(), "the run ended before its first step"
        time.sleep(0.02)
    os.kill(process.pid or 0, number)
    stderr = tmp_path / "stderr"
    assert end_of(process, seconds=120) == code, stderr.read_text()
    result = json.loads((tmp_path / "stdout").read_text())
    assert result["interrupted_by"] == number.name
    assert [Path(path).name for path in result["checkpoints"]] == [f"step-{result['steps']}"]
    assert (output / "checkpoints" / f"step-{result['steps']}" / "adapter_model.safetensors").is_file()
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert f"Stopped by {number.name}" in stderr.read_text()


def start_run_on_terminal(arguments: list[str], *, ignores_hangups: bool = False) -> tuple[BaseProcess, int]:
    """Start a run whose terminal is one of our own; return its process, and the other end of the terminal."""
    terminal, its_end = pty.openpty()
    arguments = ["train", *arguments, "--gradient-accumulation-steps", "1", "--device", "cpu"]
    process = start_on_terminal(arguments, os.environ, os.ttyname(its_end), ignores_hangups=ignores_hangups)
    assert select.select([terminal], [], [], 300)[0], "nothing was shown"
    os.close(its_end)  # now that the run has it open, closing the other end is a hangup
    return process, terminal


def read_until(terminal: int, path: Path, text: str) -> None:
    """Read what is written to a terminal until a file contains `text`."""
    deadline = time.monotonic() + 300
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text} did not come"
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)


@pytest.mark.parametrize("style", ["xterm", "dumb"])  # redrawn, and in plain lines
def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    monkeypatch.setenv("TERM", style)
    output = tmp_path / "run"
    arguments = ["--model", str(base_model), "--output", str(output), "--dataset", str(rows), "--max-steps", "9999"]
    process, terminal = start_run_on_terminal(arguments)
    read_until(terminal, output / "metrics.jsonl", "step_done")
    os.close(terminal)  # the kernel sends SIGHUP, and every later write fails
    assert end_of(process, seconds=120) == 129
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["result"]["interrupted_by"]) == ("interrupted", "SIGHUP")
    (checkpoint,) = record["result"]["checkpoints"]
    assert damage_of(output / checkpoint) is None


def test_a_run_that_ignores_the_hangup_outlives_its_terminal(base_model: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["--model", str(base_model), "--output", str(output), "--dataset", str(rows), "--max-steps", "3"]
    # As nohup starts a command, but for its output, which stays on the terminal.
    process, terminal = start_run_on_terminal(arguments, ignores_hangups=True)
    read_until(terminal, output / "run.json", "running")
    os.close(terminal)
    assert end_of(process, seconds=120) == 0
    assert json.loads((output / "run.json").read_text())["status"] == "done"


def test_the_demo_learns_in_a_tenth_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half as many rows. All of its steps are taken in `.ci/run`, which asks as much of the loss."""
    monkeypatch.setitem(DEMO_SETTINGS, "training.epochs", 0.1)
    monkeypatch.setitem(DEMO_SETTINGS, "training.micro_batch_size", 8)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo", "--output", "demo", "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert summary["train"]["steps"] == 19
    assert summary["loss_drop"] >= 0.25
    assert summary["loss_after"] <= 0.75 * summary["loss_before"]
    assert summary["answer_before"] != summary["answer_after"]
    assert summary["quantized_bytes"] < summary["float32_bytes"] / 2
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_misspelt_dataset_column_names_the_columns(run_qlora: RunQlora, base_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"promt": "a", "completion": "b"}])
    done = run_qlora("train", "--model", base_model, "--dataset", data, "--output", tmp_path / "run")
    assert done.code == 2
    assert "promt, completion" in done.stderr


# What imports bitsandbytes first, what that left on stderr, and then the command.
IMPORT_AND_RUN = """
import logging, sys
import qlora_cli.hardware.device
print(logging.getLogger("bitsandbytes.backends.cpu.ops").level, "is imported", file=sys.stderr)
from qlora_cli.cli.app import main
main()
"""


def test_libraries_say_nothing_when_they_are_imported_and_no_environment_is_needed(base_model: Path) -> None:
    """On CPUs with bf16 bitsandbytes asks for a kernel that is not used; any module may be the first to import it.

    A cache directory that can't be made must not matter for local files, nor to an import.
    """
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_RUN, "load", str(base_model), "--device", "cpu", "--json"],
        env={**os.environ, "HF_HOME": os.devnull + "/no"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("40 is imported\n")


def test_presets_are_listed_and_written_without_torch_and_a_wrong_name_is_answered(
    light_qlora: LightQlora, tmp_path: Path
) -> None:
    listed = light_qlora("presets", "--json")
    assert (listed.code, listed.heavy, listed.stderr) == (0, [], "")
    entries = json.loads(listed.stdout)["presets"]
    shown = light_qlora("presets")
    assert [entry["name"] for entry in entries if entry["name"] not in shown.stdout] == []
    file = tmp_path / "my.yaml"
    file.write_text(light_qlora("presets", "qwen3-8b-24gb").stdout, encoding="utf-8")
    sources = (Sources(config=file), Sources(preset=preset_file("qwen3-8b-24gb")))
    flags = {"data.dataset": ("--dataset", "train.jsonl"), "output.directory": ("--output", "run")}
    written, own = (resolve(replace(one, flags=flags), TrainSettings).settings for one in sources)
    assert written == own
    of_one = json.loads(light_qlora("presets", "qwen3-8b-24gb", "--json").stdout)
    assert ([one["name"] for one in of_one["presets"]], of_one["settings"]) == (["qwen3-8b-24gb"], file.read_text())
    none = light_qlora("presets", "qwen3-8b-25gb")
    assert (none.code, "qwen3-8b-24gb" in none.stderr) == (2, True)
    wrong = light_qlora("train", "--preset", "qwen3-8b-25gb", "--dataset", "x.jsonl", "--output", "y")
    assert (wrong.code, wrong.heavy, wrong.stdout) == (2, [], "")
    assert "qwen3-8b-24gb" in wrong.stderr
    assert "qlora presets lists all" in wrong.stderr
