"""`qlora evaluate` as scripts and users see it: its table, keys, refusals before torch, and lm-eval's tasks."""

import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from qlora_cli.evaluating.evaluation_result import Evaluation, SourceResult, TaskResult
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, RunQlora, train_settings, write_jsonl
from tests.support.processes.forks import end_of, start_command, wait_for_line
from tests.support.processes.light_commands import LightQlora

CPU = ("--device", "cpu", "--dtype", "fp32")
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


def qlora(*arguments: str | Path) -> Result:
    """Run the command in this process, which has imported torch already."""
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def evaluated(*arguments: str | Path) -> dict[str, Any]:
    done = qlora(*arguments, "--json")
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows that the bundled base never saw."""
    lines = (ASSETS / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    return write_jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def trained(held_out: Path, base_model: Path) -> TrainResult:
    """A run of one step that held those rows out."""
    changed = {"data__eval_dataset": str(held_out), "training__max_steps": 1}
    output = held_out.parent / "run"
    return train(train_settings(base_model, ASSETS / "train.jsonl", output, **changed), Recorder())


# ---- what is shown


def test_the_table_has_a_line_for_each_model_within_80_columns(run_qlora: RunQlora, trained: TrainResult) -> None:
    done = run_qlora("evaluate", "run", "--device", "cpu", cwd=trained.output.parent, env={"COLUMNS": "80"})
    assert done.code == 0, done.stderr
    heading, rows, columns, *models = done.stdout.splitlines()
    assert heading.startswith("run on ")
    assert rows.startswith("  8 rows, ")
    assert columns.split() == ["loss", "perplexity", "accuracy", "against", "base", "tok/s"]
    assert [line.split()[0] for line in models] == ["base", "adapter"]
    assert max(len(line) for line in (rows, columns, *models)) <= 80
    assert "\x1b" not in done.stdout
    assert "Evaluating the adapter …" in done.stderr


def test_json_is_one_object_with_every_key(trained: TrainResult) -> None:
    report = evaluated(trained.output, "--device", "cpu")
    assert list(report) == [field.name for field in fields(Evaluation)]
    base, adapter = report["sources"]
    assert list(base) == [field.name for field in fields(SourceResult)]
    assert (base["source"], adapter["source"]) == ("base", "adapter")
    assert base["difference"] is None
    assert adapter["difference"] == pytest.approx(adapter["loss"] - base["loss"])
    assert report["tasks"] == []
    assert (report["model"], report["adapter"]) == (str(trained.output), str(trained.adapter))


def test_a_plain_model_is_one_line(base_model: Path, held_out: Path) -> None:
    report = evaluated(base_model, "--dataset", held_out, "--quant", "none", *CPU)
    assert [(source["source"], source["quantization"]) for source in report["sources"]] == [("model", "none")]
    assert report["adapter"] is None
    assert report["base_model"] == str(base_model)


def test_the_batch_changes_nothing_and_the_base_may_be_left_out(trained: TrainResult) -> None:
    losses = [
        evaluated(trained.output, "--no-base", "--batch-size", size, "--device", "cpu")["sources"]
        for size in ("1", "5")
    ]
    assert [len(sources) for sources in losses] == [1, 1]
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"], rel=1e-6)


def test_several_data_sets_are_evaluated_together(base_model: Path, held_out: Path) -> None:
    names = ("--dataset", held_out, "--dataset", f"{ASSETS / 'held_out.jsonl'}#20")
    (source,) = evaluated(base_model, *names, *CPU)["sources"]
    assert source["num_rows"] == 28


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["MODEL: is missing"]),
        (["./no", "--dataset", "no.jsonl"], ["no model at ./no", "no data set at no.jsonl", "2 problems"]),
        (["BASE"], ["--dataset: is missing"]),
        (["some/model"], ["--dataset: is missing"]),
        (["BASE", "--dataset", "ROWS*2"], ["has a weight"]),
        (["BASE", "--dataset", "ROWS", "--split", "test"], ["--split: has no effect"]),
        (["BASE", "--split", "test", "--tasks", "x"], ["lm-eval"] if not HAS_LM_EVAL else ["--split: has no effect"]),
        (["BASE", "--dataset", "ROWS", "--merged", "no"], ["--merged: there is no directory no"]),
        (
            ["BASE", "--dataset", "ROWS", "--set", "data.eval_split=3", "--set", "data.packing=true"],
            ["--set data.eval_split: has no effect with rows", "--set data.packing: has no effect"],
        ),
        (["BASE", "--dataset", "ROWS", "--limit", "3"], ["--limit: has no effect without --tasks"]),
        (["BASE", "--dataset", "ROWS", "--task-path", "no"], ["--task-path: has no effect", "there is no directory"]),
        (["BASE", "--dataset", "ROWS", "--batch-size", "0"], ["--batch-size"]),
        (["BASE", "--tasks", ","], ["--tasks: must name at least one"]),
        (["BASE", "--dataset", "ROWS", "--epochs", "2"], ["no such option: --epochs"]),
    ],
)
def test_mistakes_end_with_2_before_torch_is_imported(
    light_qlora: LightQlora,
    arguments: list[str],
    expected: list[str],
    base_model: Path,
    held_out: Path,
    tmp_path: Path,
) -> None:
    given = [part.replace("BASE", str(base_model)).replace("ROWS", str(held_out)) for part in arguments]
    done = light_qlora("evaluate", *given, directory=tmp_path)
    assert (done.code, done.heavy) == (2, []), done.stderr
    assert [text for text in expected if text not in done.stderr] == []
    assert "hint: " in done.stderr
    assert done.stdout == ""


def test_a_run_is_not_a_merged_model(trained: TrainResult) -> None:
    done = qlora(trained.output, "--merged", trained.output, "--json")
    assert done.exit_code == 2
    assert "is no merged model" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_tasks_without_lm_eval_say_what_to_install_before_anything_is_loaded() -> None:
    done = qlora("./no", "--tasks", "hellaswag,arc_easy", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["type"]) == (2, "SettingsError")
    tasks, model = error["problems"]
    assert "hellaswag,arc_easy" in tasks["message"]
    assert tasks["hint"] == "Run: pip install 'qlora-cli[eval]'"
    assert "no model at ./no" in model["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_with_130_and_one_message(base_model: Path, tmp_path: Path) -> None:
    rows = ("--dataset", str(ASSETS / "train.jsonl"), "--batch-size", "1")
    process = start_command(["evaluate", str(base_model), *rows, *CPU, "--json"], os.environ, tmp_path, tmp_path)
    wait_for_line(process, tmp_path / "stderr", "Evaluating the model")
    time.sleep(0.2)
    os.kill(process.pid or 0, signal.SIGINT)
    stderr = tmp_path / "stderr"
    assert end_of(process, seconds=300) == 130, stderr.read_text()
    assert json.loads((tmp_path / "stdout").read_text())["error"]["message"] == "interrupted"
    assert "Traceback" not in stderr.read_text()


# ---- tasks

TASK = """
task: own_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task(held_out: Path) -> Path:
    """A task over a local file: which of two answers belongs to a question?"""
    pairs = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    answers = [f" {messages[-1]['content']}" for messages in pairs]
    rows = [
        {"question": messages[0]["content"], "choices": [answers[i], answers[i - 1]], "answer": 0}
        for i, messages in enumerate(pairs)
    ]
    folder = held_out.parent / "tasks"
    folder.mkdir()
    path = folder / "own.yaml"
    path.write_text(TASK.format(rows=write_jsonl(folder / "rows.jsonl", rows)))
    return path


def in_a_process(run_qlora: RunQlora, *arguments: str | Path) -> dict[str, Any]:
    # Warnings of lm-eval are not ours, and here they would be errors.
    done = run_qlora("evaluate", *arguments, *CPU, "--json")
    assert done.code == 0, done.stderr
    return done.json


def test_a_users_own_task_is_run_on_base_and_adapter(run_qlora: RunQlora, trained: TrainResult, task: Path) -> None:
    pytest.importorskip("lm_eval")
    report = in_a_process(run_qlora, trained.output, "--tasks", task)
    assert [source["source"] for source in report["sources"]] == ["base", "adapter"]
    assert [(figure["source"], figure["task"], figure["metric"]) for figure in report["tasks"]] == [
        ("base", "own_questions", "acc"),
        ("adapter", "own_questions", "acc"),
    ]
    assert all(list(figure) == [field.name for field in fields(TaskResult)] for figure in report["tasks"])
    assert all(figure["num_documents"] == 8 and 0 <= figure["value"] <= 1 for figure in report["tasks"])


def test_tasks_alone_need_no_rows_and_may_be_limited(run_qlora: RunQlora, base_model: Path, task: Path) -> None:
    pytest.importorskip("lm_eval")
    named = ("--tasks", "own_questions", "--task-path", task.parent, "--limit", "3")
    report = in_a_process(run_qlora, base_model, *named)
    assert (report["dataset"], report["sources"]) == (None, [])
    assert [figure["num_documents"] for figure in report["tasks"]] == [3]


def test_an_unknown_task_ends_with_2(run_qlora: RunQlora, base_model: Path) -> None:
    pytest.importorskip("lm_eval")
    done = run_qlora("evaluate", base_model, "--tasks", "hellaswagg", "--json")
    assert done.code == 2
    assert "Did you mean hellaswag" in done.json["error"]["hint"]
