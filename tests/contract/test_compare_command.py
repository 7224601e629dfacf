"""`qlora compare` as scripts and users see it: pairs, verdicts, exit codes, keys, and refusals before torch."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from qlora_cli.evaluating.comparison_result import ComparedRun, DifferingSetting, RunComparison
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, RunQlora, train_settings, write_jsonl
from tests.support.models.shallow_model import save_shallow
from tests.support.processes.light_commands import LightQlora

NUM_ROWS = 12


def qlora(*arguments: str | Path) -> Result:
    """Run the command in this process, which has imported torch already."""
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def compared(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    done = qlora(*arguments, "--device", "cpu", "--json")
    assert done.exit_code == code, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows that runs hold out."""
    folder = tmp_path_factory.mktemp("compare")
    save_shallow(folder / "base")
    lines = (ASSETS / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    write_jsonl(folder / "held-out.jsonl", rows[:NUM_ROWS])
    write_jsonl(folder / "shuffled.jsonl", rows[:NUM_ROWS][::-1])
    write_jsonl(folder / "others.jsonl", rows[NUM_ROWS - 2 : 2 * NUM_ROWS - 2])
    return folder


def trained(folder: Path, name: str, **changed: object) -> TrainResult:
    given = {"data__eval_dataset": str(folder / "held-out.jsonl"), "training__max_steps": 4, **changed}
    given.setdefault("training__learning_rate", 5e-3)
    return train(train_settings(folder / "base", ASSETS / "train.jsonl", folder / name, **given), Recorder())


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """A good run, one that learnt nothing, one that held out the same rows in another order, and one with others."""
    shuffled, others = str(folder / "shuffled.jsonl"), str(folder / "others.jsonl")
    return {
        "good": trained(folder, "good").output,
        "idle": trained(folder, "idle", training__learning_rate=1e-9).output,
        "shuffled": trained(folder, "shuffled", data__eval_dataset=shuffled).output,
        "others": trained(folder, "others", data__eval_dataset=others, data__max_length=300).output,
        "none": trained(folder, "none", data__eval_dataset=None).output,
    }


# ---- figures


def test_the_difference_is_that_of_the_losses_that_the_runs_measured(runs: dict[str, Path]) -> None:
    report = compared(runs["good"], runs["idle"])
    first, second = report["runs"]
    recorded = [json.loads((runs[name] / "run.json").read_text())["result"]["eval_loss"] for name in ("good", "idle")]
    assert [first["loss"], second["loss"]] == pytest.approx(recorded, abs=1e-5)
    assert second["difference"] == pytest.approx(recorded[1] - recorded[0], abs=1e-5)
    assert second["difference"] > 2 * second["difference_stderr"] > 0
    assert (first["verdict"], second["verdict"]) == ("reference", "worse")
    assert (first["difference"], first["difference_stderr"]) == (None, None)
    assert report["num_rows"] == NUM_ROWS
    assert second["num_rows_lower"] + second["num_rows_higher"] <= NUM_ROWS
    differing = {setting["setting"]: setting["values"] for setting in report["differing_settings"]}
    assert differing == {"training.learning_rate": [5e-3, 1e-9]}


def test_rows_in_another_order_are_the_same_rows(runs: dict[str, Path]) -> None:
    report = compared(runs["good"], runs["shuffled"])
    run = report["runs"][1]
    assert run["difference"] == pytest.approx(0, abs=1e-5)
    assert [setting["setting"] for setting in report["differing_settings"]] == ["data.eval_dataset"]


def test_losses_are_measured_once_and_again_for_other_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs["good"], tmp_path / "copy")
    (copy / "held_out_losses.json").unlink(missing_ok=True)
    assert [run["was_measured"] for run in compared(copy, copy)["runs"]] == [True, False]
    before = compared(copy, copy)["runs"][0]
    assert before["was_measured"] is False
    weights = load_file(copy / "adapter" / "adapter_model.safetensors")
    save_file({name: 3 * value for name, value in weights.items()}, copy / "adapter" / "adapter_model.safetensors")
    after = compared(copy, copy)["runs"][0]
    assert after["was_measured"] is True
    assert after["loss"] != pytest.approx(before["loss"], abs=1e-3)


def test_named_rows_are_those_that_all_runs_are_compared_on(folder: Path, runs: dict[str, Path]) -> None:
    report = compared(runs["good"], runs["none"], "--dataset", folder / "others.jsonl")
    assert report["dataset"] == str(folder / "others.jsonl")
    assert (report["num_rows"], report["runs"][1]["difference"]) == (NUM_ROWS, pytest.approx(0, abs=1e-5))
    assert not (runs["none"] / "held_out_losses.json").exists()


# ---- exit codes


def test_a_run_that_is_worse_by_more_than_the_margin_fails(runs: dict[str, Path]) -> None:
    worse = compared(runs["good"], runs["idle"], "--fail-if-worse", "0.01", code=1)
    assert (worse["is_worse"], worse["margin"]) == (True, 0.01)
    allowed = compared(runs["good"], runs["idle"], "--fail-if-worse", "10")
    assert allowed["runs"][1]["verdict"] == "not_worse"
    assert compared(runs["idle"], runs["good"], "--fail-if-worse", "0")["runs"][1]["verdict"] == "not_worse"
    assert compared(runs["good"], runs["idle"])["is_worse"] is True  # without the flag it is only said


def test_a_run_is_as_good_as_itself(runs: dict[str, Path]) -> None:
    report = compared(runs["good"], runs["good"], "--fail-if-worse", "0")
    assert (report["runs"][1]["difference"], report["runs"][1]["difference_stderr"]) == (0, 0)


# ---- what is shown


def test_the_table_has_a_line_for_each_run_within_80_columns(run_qlora: RunQlora, runs: dict[str, Path]) -> None:
    given = (runs["good"], runs["idle"], "--device", "cpu", "--fail-if-worse", "0.01")
    done = run_qlora("compare", *given, env={"COLUMNS": "80"})
    assert done.code == 1, done.stderr
    _, columns, *models = done.stdout.splitlines()[:4]
    assert columns.split() == ["run", "loss", "against", "the", "first", "tok/s", "memory"]
    assert [line.split()[0] for line in models] == ["good", "idle"]
    assert models[1].split()[-4] == "worse"
    assert max(map(len, (columns, *models))) <= 80
    assert "training.learning_rate  0.005 | 1e-09" in done.stdout
    assert f"failed: {runs['idle']}: worse than {runs['good']} by more than 0.01 nats" in done.stderr


def test_the_updates_of_the_final_adapters_are_those_that_the_runs_measured(runs: dict[str, Path]) -> None:
    report = compared(runs["good"], runs["idle"])
    for run in report["runs"]:
        health = json.loads((Path(run["path"]) / "run.json").read_text())["result"]["adapter_health"]
        expected = [health["rank"], health["effective_rank"], health["relative_norm"]]
        assert [run["adapter_rank"], run["effective_rank"], run["relative_update_norm"]] == expected
    good, idle = report["runs"]
    assert good["relative_update_norm"] > 100 * idle["relative_update_norm"]
    shown = qlora(runs["good"], runs["idle"], "--device", "cpu").stdout
    assert f"good  rank {good['adapter_rank']} uses {good['effective_rank']:.1f}; " in shown


def test_json_is_one_object_with_every_key(runs: dict[str, Path]) -> None:
    report = compared(runs["good"], runs["idle"])
    assert list(report) == [field.name for field in fields(RunComparison)]
    assert list(report["runs"][0]) == [field.name for field in fields(ComparedRun)]
    assert list(report["differing_settings"][0]) == [field.name for field in fields(DifferingSetting)]


# ---- refusals


def test_other_rows_are_refused_with_the_settings_that_differ(runs: dict[str, Path]) -> None:
    done = qlora(runs["good"], runs["others"], "--device", "cpu")
    assert done.exit_code == 2
    assert f"of {NUM_ROWS} and {NUM_ROWS}, 2 have the same tokens and labels" in done.stderr
    assert "they differ in data.eval_dataset, data.max_length" in done.stderr
    assert "--dataset" in done.stderr


def test_a_run_that_held_nothing_out_needs_rows(runs: dict[str, Path]) -> None:
    done = qlora(runs["good"], runs["none"], "--device", "cpu")
    assert done.exit_code == 2
    assert "held no rows out" in done.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("RUN",), "only one run"),
        (("RUN", "."), ". is no run directory"),
        (("RUN", "./no"), "no is no run directory"),
        (("RUN", "RUN", "--fail-if-worse", "-1"), "--fail-if-worse: must be a number of nats"),
        (("RUN", "RUN", "--fail-if-worse", "nan"), "--fail-if-worse: must be a number of nats"),
        (("RUN", "RUN", "--dataset", "no.jsonl"), "--dataset: "),
        (("RUN", "RUN", "--batch-size", "0"), "--batch-size: must be greater"),
        (("RUN", "RUN", "--set", "evaluate.batch_sise=3"), "unknown setting"),
    ],
)
def test_mistakes_are_refused_before_torch_is_imported(
    given: tuple[str, ...], says: str, runs: dict[str, Path], light_qlora: LightQlora, tmp_path: Path
) -> None:
    named = [str(runs["good"]) if word == "RUN" else word for word in given]
    done = light_qlora("compare", *named, directory=tmp_path)
    assert done.code == 2
    assert says in done.stderr
    assert done.heavy == []


def test_runs_whose_losses_are_kept_are_compared_without_torch(
    runs: dict[str, Path], light_qlora: LightQlora, tmp_path: Path
) -> None:
    compared(runs["good"], runs["idle"])
    done = light_qlora("compare", str(runs["good"]), str(runs["idle"]), directory=tmp_path)
    assert (done.code, done.heavy) == (0, [])
