"""`qlora load` as scripts and users see it: text at 80 columns, keys of --json, --error, hints, mistakes, Ctrl-C."""

import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks.synthetic import SHAPES, write_model
from qlora_cli.cli.app import app
from qlora_cli.cli.rendering.load_text import BARS
from qlora_cli.loading import load_plan
from qlora_cli.quantization.load_report import KindCount, LoadReport
from tests.conftest import RunQlora
from tests.support.processes.forks import end_of, start_command, wait_for_line

CPU = ("--device", "cpu", "--dtype", "fp32")


def qlora_load(*arguments: str | Path) -> Result:
    """Run the command in this process, which has imported torch already."""
    return CliRunner().invoke(app, ["load", *map(str, arguments)])


def loaded(*arguments: str | Path) -> dict[str, Any]:
    done = qlora_load(*arguments, *CPU, "--json")
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def shown(run_qlora: RunQlora, base_model: Path) -> str:
    """What a terminal of 80 columns shows, with the error measured."""
    done = run_qlora("load", base_model, *CPU, "--error", env={"COLUMNS": "80"})
    assert done.code == 0, done.stderr
    assert "\x1b" not in done.stdout
    return done.stdout


# ---- what is shown


def test_the_text_says_what_was_loaded_within_80_columns(shown: str, base_model: Path) -> None:
    first, *lines = shown.splitlines()
    assert first == str(base_model)
    rows = dict(line.strip().split("  ", 1) for line in lines if line.startswith("  ") and "  " in line.strip())
    assert {key: rows[key].strip() for key in ("architecture", "parameters", "quantization", "compute dtype")} == {
        "architecture": "LlamaForCausalLM on cpu",
        "parameters": "3.54M, 2.75M of them quantized",
        "quantization": "NF4, double quantization, 4.22 bits a parameter",
        "compute dtype": "fp32 (as asked)",
    }
    assert {"constants", "total", "load time", "peak host memory"} <= rows.keys()
    # Reasons and advice are left to the terminal to wrap, so that they can be searched for.
    wide = [line for line in lines if len(line) > 80]
    assert [line for line in wide if "looked up, not multiplied" not in line and "It would fit" not in line] == []


def test_the_text_says_where_the_bytes_are(shown: str) -> None:
    table = shown.partition("Where the bytes are")[2].partition("Quantization error")[0]
    assert [line.split("  ")[1] for line in table.splitlines() if line.strip()] == [
        "embedding",
        "linear layers",
        "norms, biases, vectors",
    ]
    assert "looked up, not multiplied" in table


def test_the_error_is_shown_as_bars_with_its_range_and_the_worst_weights(shown: str) -> None:
    error = shown.partition("Quantization error")[2]
    (bars,) = [line for line in error.splitlines() if "by layer" in line]
    assert len([character for character in bars if character in BARS]) == 4  # one a layer
    assert "all weights" in error
    assert error.count("largest") == 3
    assert "model.layers." in error


def test_it_says_when_quantization_is_not_needed(
    shown: str, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "It would fit here unquantized"
    assert advice in shown
    assert "--quant none" in shown
    assert advice not in qlora_load(base_model, *CPU, "--quant", "none").stdout
    report = loaded(base_model)
    assert report["unquantized_fits"] is True
    monkeypatch.setattr(load_plan, "free_bytes", lambda _: 2 * report["unquantized_model_bytes"] - 1)
    assert loaded(base_model)["unquantized_fits"] is False
    assert advice not in qlora_load(base_model, *CPU).stdout


def test_json_has_exactly_the_keys_of_the_report(base_model: Path) -> None:
    report = loaded(base_model)
    assert set(report) == {field.name for field in fields(LoadReport)}
    assert {frozenset(kind) for kind in report["kinds"]} == {frozenset(field.name for field in fields(KindCount))}
    assert report["errors"] is None
    assert report["saved"] is None
    assert sum(kind["num_parameters"] for kind in report["kinds"]) == report["num_parameters"]


def test_errors_of_every_weight_are_about_9_percent_in_nf4_and_more_in_fp4(base_model: Path) -> None:
    means = {}
    for method in ("nf4", "fp4"):
        errors = loaded(base_model, "--quant", method, "--error")["errors"]
        assert len(errors) == 4 * 7
        assert all(set(error) == {"name", "relative_rms"} for error in errors)
        assert {error["name"] for error in errors} >= {"model.layers.0.self_attn.q_proj.weight"}
        means[method] = sum(error["relative_rms"] for error in errors) / len(errors)
    assert 0.085 < means["nf4"] < 0.1
    assert means["fp4"] > 1.2 * means["nf4"]


def test_progress_is_on_stderr_and_the_result_alone_on_stdout(run_qlora: RunQlora, base_model: Path) -> None:
    done = run_qlora("load", base_model, *CPU, "--json")
    assert done.code == 0
    assert done.json["quantization"] == "nf4"
    assert "Quantizing" in done.stderr
    assert done.stdout.startswith("{")
    assert done.stdout.endswith("}\n")


# ---- mistakes


@pytest.mark.parametrize("method", ["none", "int8"])
def test_there_is_no_4_bit_error_without_4_bit(base_model: Path, method: str) -> None:
    done = qlora_load(base_model, *CPU, "--quant", method, "--error")
    assert done.exit_code == 2
    assert "error: the model is not quantized to 4 bit, so there is no 4-bit error to measure" in done.stderr
    assert "hint: Leave --error out." in done.stderr


def test_the_error_of_a_checkpoint_that_was_saved_quantized_can_not_be_measured(
    base_model: Path, tmp_path: Path
) -> None:
    report = loaded(base_model, "--save", tmp_path / "saved")
    assert report["saved"] == str(tmp_path / "saved")
    assert report["saved_bytes"] == sum(file.stat().st_size for file in (tmp_path / "saved").iterdir())
    assert loaded(tmp_path / "saved")["prequantized"] is True
    done = qlora_load(tmp_path / "saved", *CPU, "--error")
    assert done.exit_code == 2
    assert "the model is already quantized" in done.stderr
    again = qlora_load(base_model, *CPU, "--save", tmp_path / "saved")
    assert again.exit_code == 2
    assert "contains other files" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quant", "nf5", "--dtype", "bf17"], ["--quant: 'nf5'", "--dtype: 'bf17'", "2 problems"]),
        (
            ["--quant", "none", "--set", "quantization.compute_dtype=bf16"],
            ["--set quantization.compute_dtype: quantization.compute_dtype has no effect"],
        ),
        (
            ["--set", "quantization.int8_threshold=-1", "--rope-scaling", "yarn"],
            ["--set quantization.int8_threshold: must be greater", "--rope-scaling: expected TYPE:FACTOR"],
        ),
        (
            [
                "--quant",
                "int8",
                "--set",
                "quantization.compute_dtype=bf16",
                "--set",
                "quantization.quant_storage=bf16",
            ],
            [
                "--set quantization.compute_dtype: quantization.compute_dtype",
                "--set quantization.quant_storage: quant",
                "2 problems",
            ],
        ),
        (["--revision", "v1"], ["a revision (v1) has no meaning"]),
        (["--device", "cpu", "--offload-embedding"], ["--offload-embedding: has no effect"]),
        (["--device", "cpu", "--dtype", "fp16"], ["fp16 is not trained on a CPU"]),
        (["--device", "cpu", "--attention", "flash_attention_2"], ["flash_attention_2 needs an NVIDIA GPU"]),
        (["--device", "cpu", "--chat-template", "no.jinja"], ["the chat template no.jinja can't be read"]),
        (["--device", "cpu", "--new-tokens", "<a>,<a>"], ["the new token <a> is given twice"]),
        (["--device", "cpu", "--quant", "none", "--save", "saved"], ["nothing is quantized"]),
        (["--device", "cpu", "--set", "quantization.skip_modules=layers"], ["can be stored in nf4"]),
    ],
)
def test_a_mistake_is_reported_on_stderr_and_as_one_object_on_stdout(
    base_model: Path, arguments: list[str], expected: list[str]
) -> None:
    done = qlora_load(base_model, *arguments, "--json")
    assert done.exit_code == 2, done.output
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["hint"] or error["problems"]
    for text in expected:
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_fit_is_refused_before_it_is_read_with_exit_code_3(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_plan, "free_bytes", lambda _: 1000)
    done = qlora_load(base_model, *CPU, "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["error"]["type"] == "OutOfMemoryError"
    assert "1000 B are free" in done.stderr


# ---- from outside


def test_ctrl_c_while_loading_ends_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    # Wide enough that quantizing takes seconds.
    model = tmp_path / "model"
    write_model(model, replace(SHAPES["tiny"], hidden_size=1024, intermediate_size=8192, num_layers=8))
    streams = tmp_path / "streams"
    streams.mkdir()
    command = ["load", str(model), "--device", "cpu", "--save", str(tmp_path / "saved")]
    process = start_command(command, os.environ, tmp_path, streams)
    wait_for_line(process, streams / "stderr", "Loading ")
    os.kill(process.pid or 0, signal.SIGINT)
    stderr = streams / "stderr"
    assert end_of(process, seconds=300) == 130, stderr.read_text()
    assert (streams / "stdout").read_text() == ""
    assert "interrupted" in stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "streams"]


def test_ctrl_c_while_saving_ends_with_130_and_leaves_nothing(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object, directory: Path, **__: object) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_cli.loading.save.save_torch_state_dict", interrupted)
    done = qlora_load(base_model, *CPU, "--save", tmp_path / "saved", "--json")
    assert done.exit_code == 130
    assert json.loads(done.stdout)["error"]["message"] == "interrupted"
    assert list(tmp_path.iterdir()) == []
