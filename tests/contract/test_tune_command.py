"""`qlora tune` as scripts and users see it: refusals before torch, keys, the table, a dry run that writes nothing."""

import json
import os
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from qlora_cli.tuning.tuning_result import TrialResult, TunePlan, TuneResult
from tests.conftest import ASSETS, RunQlora, write_jsonl
from tests.support.models.shallow_model import save_shallow
from tests.support.processes.forks import end_of, start_command
from tests.support.processes.light_commands import LightQlora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows and a place for results."""
    folder = tmp_path_factory.mktemp("tune")
    save_shallow(folder / "base")
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    write_jsonl(folder / "rows.jsonl", [json.loads(line) for line in lines])
    return folder


def arguments(folder: Path, *more: str, output: str = "tune") -> list[str]:
    flags = {
        "--model": folder / "base",
        "--dataset": folder / "rows.jsonl",
        "--eval-split": "8",
        "--output": folder / output,
        "--device": "cpu",
        "--dtype": "fp32",
        "--micro-batch-size": 2,
        "--gradient-accumulation-steps": 1,
        "--target-modules": "q_proj",
    }
    return ["tune", *(str(word) for flag in flags.items() for word in flag), *more]


def qlora(*given: str) -> Result:
    """Run the command in this process, which has imported torch already."""
    return CliRunner().invoke(app, list(given))


def test_json_has_every_key_and_the_settings_file_is_taken_by_train(folder: Path) -> None:
    done = qlora(*arguments(folder, "--learning-rates", "5e-3,1e-4", "--trial-steps", "2", "--json"))
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    assert list(report) == [field.name for field in fields(TuneResult)]
    assert list(report["trials"][0]) == [field.name for field in fields(TrialResult)]
    assert [(one["learning_rate"], one["num_steps"]) for one in report["trials"]] == [(1e-4, 2), (5e-3, 2)]
    assert report["learning_rate"] == 5e-3
    page = Path(report["page"]).read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    shown = qlora("config", "show", "--config", report["settings_file"], "--json")
    value = json.loads(shown.stdout)["training.learning_rate"]
    assert value["value"] == 5e-3
    assert value["origin"].startswith(report["settings_file"])


def test_the_table_has_a_line_for_each_trial_within_80_columns(folder: Path, run_qlora: RunQlora) -> None:
    given = arguments(folder, "--learning-rates", "1e-4,5e-3", "--trial-steps", "2", output="table")
    done = run_qlora(*given, env={"COLUMNS": "80"})
    assert done.code == 0, done.stderr
    _, columns, *trials = done.stdout.splitlines()[:4]
    assert columns.split() == ["learning", "rate", "steps", "loss", "above", "the", "best", "time"]
    assert [line.split()[0] for line in trials] == ["0.0001", "0.005"]
    assert max(map(len, (columns, *trials))) <= 80
    assert f"qlora train --config {folder / 'table' / 'tuned.yaml'}" in done.stderr
    assert "2 learning rates in 4 to 4 steps" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_trials_that_are_done_and_no_checkpoint(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "tune"
    command = arguments(folder, "--learning-rates", "5e-3,1e-4", "--trial-steps", "80", output=str(output))
    process = start_command(command, os.environ, tmp_path, streams=tmp_path)
    record, deadline = output / "tune.json", time.monotonic() + 300
    while not (record.exists() and json.loads(record.read_text())["trials"]):
        assert time.monotonic() < deadline, "no trial was done"
        assert process.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    os.kill(process.pid or 0, number)
    assert end_of(process, seconds=120) == code
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said
    assert f"1 trial in {record} kept: the same command goes on after them" in said
    assert {path.name for path in output.iterdir()} == {"run.lock", "tune.json"}


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(folder: Path) -> None:
    done = qlora(*arguments(folder, "--dry-run", "--json", output="dry"))
    assert done.exit_code == 0, done.output
    plan: dict[str, Any] = json.loads(done.stdout)
    assert list(plan) == [field.name for field in fields(TunePlan)]
    assert plan["learning_rates"] == [2e-4 * factor for factor in (0.25, 0.5, 1, 2, 4, 8)]
    assert (plan["num_eval_rows"], plan["trial_steps"]) == (8, [8, 16])
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--learning-rates", "1e-4"), "--learning-rates: 2 to 32 different rates are compared, got 1"),
        (("--learning-rates", "1e-4,1e-4"), "got 1"),
        (("--learning-rates", "1e-4,fast"), "--learning-rates: 'fast' is no learning rate"),
        (("--learning-rates", "1e-4,2"), "'2' is no learning rate"),
        (("--learning-rates", "nan,2e-4"), "'nan' is no learning rate"),
        (("--trial-steps", "0"), "--trial-steps"),
        (("--num-gpus", "2"), "--num-gpus: can't be tuned with"),
        (("--calibrate",), "--calibrate: can't be tuned with"),
        (("--memory-budget", "20GiB"), "--memory-budget: can't be tuned with"),
        (("--streaming", "--max-steps", "9", "--eval-dataset", "ROWS"), "--streaming: can't be tuned with"),
        (("--eval-dataset", "no.jsonl"), "--eval-dataset: "),
        (("--rank", "0"), "--rank: must be greater"),
    ],
)
def test_mistakes_are_refused_before_torch_is_imported(
    given: tuple[str, ...], says: str, folder: Path, light_qlora: LightQlora, tmp_path: Path
) -> None:
    named = [str(folder / "rows.jsonl") if word == "ROWS" else word for word in given]
    words = arguments(folder, *named, output="never")
    if "--eval-dataset" in given:
        words = [word for word in words if word not in ("--eval-split", "8")]
    done = light_qlora(*words, directory=tmp_path)
    assert done.code == 2
    assert says in done.stderr
    assert done.heavy == []
    assert not (folder / "never").exists()
