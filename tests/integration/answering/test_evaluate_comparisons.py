"""Runs that compare answers are evaluated by what they measured themselves, and compared with other runs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.runs.find_runs import read_run
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, RunQlora, train_settings, write_jsonl
from tests.integration.training.test_labelled_answers import LABELLED
from tests.integration.training.test_preferences import PAIRS, SETTINGS, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = ("--device", "cpu", "--json")
STEP = 3  # rows: those held out are two groups with a baseline of their own
SFT: dict[str, object] = {
    "training__objective": "sft",
    "data__format": "prompt_completion",
    "data__columns": "completion=chosen",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows by the format that an objective reads."""
    folder = tmp_path_factory.mktemp("compared")
    pairs = write_pairs(folder / "pairs.jsonl", PAIRS)
    others = [(f"# {prompt}", *answers) for prompt, *answers in PAIRS]  # what is held out is not trained on
    return {
        "pairs": pairs,
        "labels": write_jsonl(folder / "labels.jsonl", LABELLED),
        "other pairs": write_pairs(folder / "other-pairs.jsonl", [(a, b, c) for a, b, c in others]),
        "other labels": write_jsonl(
            folder / "other-labels.jsonl", [{**row, "prompt": f"# {row['prompt']}"} for row in LABELLED]
        ),
    }


@pytest.fixture(scope="module")
def runs(base_model: Path, files: dict[str, Path]) -> dict[str, Path]:
    """A run by each objective that holds its own rows out, and one with another beta that learnt nothing."""
    folder = files["pairs"].parent
    kto = {"training__objective": "kto", "training__desirable_weight": 1.5, "training__micro_batch_size": STEP}
    runs: dict[str, dict[str, object]] = {
        "dpo": {"training__learning_rate": 5e-3},
        "idle": {"training__learning_rate": 1e-9, "training__beta": 0.1},
        "orpo": {"training__objective": "orpo"},
        "kto": kto,
        "sft": SFT,
    }
    for name, changed in runs.items():
        file = files["labels" if name == "kto" else "pairs"]
        flags = {**SETTINGS, "training__max_steps": 2, "training__save_steps": 2, **changed}
        flags = {key: value for key, value in flags.items() if name != "sft" or key != "training__beta"}
        train(
            train_settings(
                base_model, files[f"other {file.stem}"], folder / name, data__eval_dataset=str(file), **flags
            ),
            Recorder(),
        )
    return {name: folder / name for name in runs}


@pytest.fixture(scope="module")
def evaluations(runs: dict[str, Path], run_qlora: RunQlora) -> dict[str, dict[str, Any]]:
    """What is measured of the runs that compare answers."""
    done = {name: run_qlora("evaluate", runs[name], *CPU) for name in ("dpo", "orpo", "kto")}
    assert [one.code for one in done.values()] == [0, 0, 0], [one.stderr for one in done.values()]
    return {name: one.json for name, one in done.items()}


def adapter_of(report: dict[str, Any]) -> dict[str, Any]:
    (found,) = (source for source in report["sources"] if source["source"] == "adapter")
    return dict(found)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_an_evaluation_measures_what_the_run_did(
    objective: str, runs: dict[str, Path], evaluations: dict[str, dict[str, Any]]
) -> None:
    of_run, report = read_run(runs[objective]).history.evaluations[-1], evaluations[objective]
    assert of_run.rewards is not None
    measured = adapter_of(report)["preference"]
    assert measured["loss"] == pytest.approx(of_run.loss, abs=1e-6)
    assert measured["margin"] == pytest.approx(of_run.rewards.margin, abs=1e-5)
    assert measured["accuracy"] == pytest.approx(of_run.rewards.accuracy)
    assert measured["kl"] == (None if of_run.rewards.kl is None else pytest.approx(of_run.rewards.kl, abs=1e-5))
    assert all(measured[f"{name}_stderr"] > 0 for name in ("loss", "margin", "chosen_reward", "rejected_reward"))
    assert measured["chosen_reward"] - measured["rejected_reward"] == pytest.approx(measured["margin"])
    answers = report["compared_answers"]
    assert (answers["objective"], answers["beta"]) == (objective, 0.5)
    assert answers["num_rows"] == (len(LABELLED) if objective == "kto" else len(PAIRS))
    of_base = [source["preference"] for source in report["sources"] if source["source"] == "base"]
    assert [one is None for one in of_base] == [objective != "orpo"], "the others compare with it"


def test_the_chosen_answers_by_themselves_have_the_loss_that_sft_shows(
    runs: dict[str, Path], files: dict[str, Path], evaluations: dict[str, dict[str, Any]], run_qlora: RunQlora
) -> None:
    columns = ("--format", "prompt_completion", "--columns", "completion=chosen", "--no-base")
    alone = run_qlora("evaluate", runs["dpo"], "--dataset", files["pairs"], *columns, *CPU)
    assert alone.code == 0, alone.stderr
    of_pairs, of_chosen = adapter_of(evaluations["dpo"]), adapter_of(alone.json)
    assert of_pairs["loss"] == pytest.approx(of_chosen["loss"], abs=1e-6)
    assert (of_pairs["num_rows"], of_pairs["num_tokens"]) == (of_chosen["num_rows"], of_chosen["num_tokens"])
    assert (of_chosen["preference"], alone.json["compared_answers"]) == (None, None)


def test_the_base_may_be_left_out_and_is_compared_with_all_the_same(
    runs: dict[str, Path], evaluations: dict[str, dict[str, Any]], run_qlora: RunQlora
) -> None:
    without = run_qlora("evaluate", runs["dpo"], "--no-base", *CPU)
    assert [source["source"] for source in without.json["sources"]] == ["adapter"]
    assert adapter_of(without.json)["difference"] is None
    assert adapter_of(without.json)["preference"] == adapter_of(evaluations["dpo"])["preference"]


def test_runs_of_one_objective_are_judged_by_its_loss_with_the_settings_of_the_first(
    runs: dict[str, Path], run_qlora: RunQlora
) -> None:
    done = run_qlora("compare", runs["dpo"], runs["idle"], "--fail-if-worse", "0", *CPU)
    recorded = read_run(runs["dpo"]).history.evaluations[-1]
    first, second = done.json["runs"]
    assert done.json["loss_of"] == "dpo"
    assert first["loss"] == pytest.approx(recorded.loss, abs=1e-6)
    assert second["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert recorded.rewards is not None
    assert first["accuracy"] == recorded.rewards.accuracy
    assert second["accuracy_difference"] == pytest.approx(second["accuracy"] - first["accuracy"])
    assert second["difference"] > 2 * second["difference_stderr"] > 0
    assert (second["verdict"], done.code) == ("worse", 1)
    assert any("by those of the first, beta 0.5" in note for note in done.json["notes"])
    kept = run_qlora("compare", runs["idle"], runs["dpo"], *CPU).json["runs"]
    assert [run["was_measured"] for run in kept] == [False, False]
    assert kept[1]["loss"] > first["loss"], "by a beta of 0.1"


def test_runs_of_different_objectives_are_judged_by_what_they_share(
    runs: dict[str, Path], files: dict[str, Path], evaluations: dict[str, dict[str, Any]], run_qlora: RunQlora
) -> None:
    done = run_qlora("compare", runs["sft"], runs["dpo"], runs["orpo"], "--dataset", files["pairs"], *CPU)
    assert (done.code, done.json["loss_of"], done.json["num_rows"]) == (0, "chosen", len(PAIRS)), done.stderr
    assert any("different objectives (dpo, orpo, sft)" in note for note in done.json["notes"])
    sft, dpo, orpo = done.json["runs"]
    assert sft["loss"] == pytest.approx(read_run(runs["sft"]).history.evaluations[-1].loss, abs=1e-5)
    assert dpo["loss"] == pytest.approx(adapter_of(evaluations["dpo"])["loss"], abs=1e-6)
    rewards = read_run(runs["dpo"]).history.evaluations[-1].rewards
    assert rewards is not None
    assert dpo["accuracy"] == rewards.accuracy
    assert None not in (orpo["accuracy_difference"], orpo["accuracy_difference_stderr"])


def test_the_baseline_of_kto_is_that_of_the_first_runs_step(
    runs: dict[str, Path], run_qlora: RunQlora, tmp_path: Path
) -> None:
    other = shutil.copytree(runs["kto"], tmp_path / "other")
    record = json.loads((other / "run.json").read_text(encoding="utf-8"))
    record["settings"]["training"]["micro_batch_size"] = len(LABELLED)
    (other / "run.json").write_text(json.dumps(record), encoding="utf-8")
    done = run_qlora("compare", runs["kto"], other, *CPU)
    assert (done.code, done.json["loss_of"]) == (0, "kto"), done.stderr
    assert done.json["runs"][1]["difference"] == pytest.approx(0, abs=1e-7), "same weights, same groups"
    measured = run_qlora("compare", other, runs["kto"], *CPU).json["runs"]
    assert [run["was_measured"] for run in measured] == [True, True], "their baselines are of other groups"
    whole = measured[0]["loss"]
    assert whole != pytest.approx(done.json["runs"][0]["loss"], abs=1e-7)
