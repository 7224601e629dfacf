"""Which weights commands take from real runs: stopped, resumed, killed, done without an adapter, or moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import DatasetNotFoundError, ModelNotFoundError, OutputDirectoryError, SettingsError
from qlora_cli.evaluating.evaluation import evaluate
from qlora_cli.evaluating.evaluation_result import Evaluation
from qlora_cli.events import Noted, StepDone
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.memory.model_facts import find_model_facts
from qlora_cli.model_files.source import find_model
from qlora_cli.runs.checkpoints import list_checkpoints
from qlora_cli.settings.models import EstimateSettings, EvaluateSettings, LoadSettings, ModelSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.settings.settle import resolved_in_code
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, short_settings
from tests.support.models.loading import load
from tests.support.processes.killed_runs import kill_after
from tests.support.processes.training_process import SignalAt

WEIGHTS = "adapter_model.safetensors"
CHANGED: dict[str, object] = {"training__max_steps": 6, "training__save_steps": 1, "training__learning_rate": 0.01}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def notes_of(recorder: Recorder) -> str:
    return "\n".join(event.message for event in recorder.events if isinstance(event, Noted))


def evaluated(run: Path, **flags: object) -> Evaluation:
    values = {"model.name": str(run), "model.device": "cpu", **flags}
    given = Sources(flags={path: (path, value) for path, value in values.items()})
    return evaluate(resolve(given, EvaluateSettings), Recorder())


def test_a_run_stopped_resumed_and_killed_is_its_newest_checkpoint(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = short_settings(base_model, rows, run, **{**CHANGED, "data__eval_split": "3"})
    first = train(settings, SignalAt(StepDone, 2))
    assert first.interrupted_by == "SIGTERM"
    assert first.steps < 5
    stopped = find_model(ModelSettings(name=str(run)))
    assert (stopped.adapter, stopped.adapter_step, stopped.run_is_done) == (run / "adapter", first.steps, False)
    of_stop = shutil.copytree(run / "adapter", tmp_path / "of-stop")

    kill_after(settings, 5)
    assert not (run / "adapter").exists()  # it was the adapter of the stop
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))  # a killed run can't record its end
    shutil.copytree(of_stop, run / "adapter")  # as older versions left it
    recorder = Recorder()
    killed = find_model(ModelSettings(name=str(run)), recorder)
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert (newest.name, killed.adapter, killed.adapter_step, killed.run_is_done) == ("step-5", newest, 5, False)
    assert "of step 5 of 6; the run has not ended" in notes_of(recorder)
    report = load(run, model__dtype=None).report()
    assert (report.adapter, report.adapter_step, report.run_is_done) == (newest, 5, False)
    evaluation = evaluated(run)
    assert (evaluation.adapter_step, evaluation.run_is_done) == (5, False)
    base, adapter = evaluation.sources
    assert adapter.loss != base.loss
    (alone,) = [source for source in evaluated(newest).sources if source.source == "adapter"]
    assert adapter.loss == alone.loss

    assert train(settings, Recorder()).steps == 6
    done = find_model(ModelSettings(name=str(run)))
    assert (done.adapter, done.adapter_step, done.run_is_done) == (run / "adapter", 6, True)
    assert weights_in(run / "adapter").keys() == weights_in(of_stop).keys()


def test_a_done_run_that_lost_its_adapter_writes_it_again_by_the_same_command(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = short_settings(base_model, rows, run, training__max_steps=2)
    train(settings, Recorder())
    adapter = weights_in(run / "adapter")
    (run / "adapter" / WEIGHTS).unlink()  # the rest is not an adapter
    model = find_model(ModelSettings(name=str(run)))
    assert (model.adapter_step, model.run_is_done) == (2, True)
    recorder = Recorder()
    result = train(settings, recorder)
    assert not [event for event in recorder.events if isinstance(event, StepDone)]
    again = weights_in(result.adapter)
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
    assert (result.steps, result.interrupted_by) == (2, None)
    for folder in ("adapter", "checkpoints"):
        shutil.rmtree(run / folder)
    with pytest.raises(OutputDirectoryError, match="is done, and neither its adapter nor a checkpoint exists"):
        train(settings, Recorder())


def test_an_adapter_without_a_checkpoint_is_never_trained_over(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = short_settings(base_model, rows, run, **CHANGED)
    train(settings, SignalAt(StepDone, 2))
    shutil.rmtree(run / "checkpoints")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for again in (settings, short_settings(base_model, rows, run, **CHANGED, lora__rank=4)):
        with pytest.raises(
            OutputDirectoryError, match="no checkpoint to resume from, and its adapter/ would be lost"
        ) as no:
            train(again, Recorder())
        assert no.value.exit_code == 2
        assert f"--model {run / 'adapter'} in a new --output" in str(no.value.hint)
    assert {path: path.read_bytes() for path in files} == files
    on = {"training__max_steps": 1}
    # As the hint says.
    assert train(short_settings(run / "adapter", rows, tmp_path / "on", **on), Recorder()).steps == 1


def test_a_done_run_without_checkpoints_stays_done_and_is_not_trained_over(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    constant = {**CHANGED, "training__schedule": "constant", "training__warmup_ratio": 0.0}
    settings = short_settings(base_model, rows, run, **{**constant, "training__max_steps": 2})
    train(settings, Recorder())
    shutil.rmtree(run / "checkpoints")
    adapter = (run / "adapter" / WEIGHTS).read_bytes()
    with pytest.raises(OutputDirectoryError, match="no checkpoint to resume from, and its adapter/ would be lost"):
        train(short_settings(base_model, rows, run, **{**constant, "training__max_steps": 3}), Recorder())

    record = json.loads((run / "run.json").read_text())
    older = {key: record["result"][key] for key in ("steps", "num_steps", "final_loss")}
    (run / "run.json").write_text(json.dumps({**record, "result": older}))
    same_rows = Path(shutil.copyfile(rows, tmp_path / "other-name.jsonl"))
    for again in (settings, short_settings(base_model, same_rows, run, **{**constant, "training__max_steps": 2})):
        recorder = Recorder()
        result = train(again, recorder)
        assert not [event for event in recorder.events if isinstance(event, StepDone)]
        assert "it is done: nothing is left to train" in notes_of(recorder)
        assert (result.steps, result.final_loss, result.train_loss) == (2, older["final_loss"], None)
    assert (run / "adapter" / WEIGHTS).read_bytes() == adapter


def test_figures_of_a_resumed_run_are_of_all_its_steps(base_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = short_settings(base_model, rows, tmp_path / "run", **CHANGED)
    first = train(settings, SignalAt(StepDone, 3))
    second = train(settings, Recorder())
    assert second.num_tokens > first.num_tokens
    assert second.train_seconds > first.train_seconds
    assert second.total_seconds > first.total_seconds
    assert second.total_seconds >= second.train_seconds
    # Steps are part of the loop's time, so this holds if tokens and seconds are of the same steps.
    assert second.tokens_per_second >= second.num_tokens / second.train_seconds


def test_a_run_moved_with_all_its_files_loads_and_evaluates_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(ASSETS / "base", project / "models" / "base")
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (project / "rows.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    (project / "held-out.jsonl").write_text("".join(lines[8:12]), encoding="utf-8")
    monkeypatch.chdir(project)
    settings = short_settings(
        Path("models/base"), Path("rows.jsonl"), Path("runs/a"), data__eval_dataset="held-out.jsonl"
    )
    result = train(settings, Recorder())

    monkeypatch.chdir(tmp_path)  # from another directory
    before = evaluated(project / "runs" / "a")
    record = json.loads((project / "runs" / "a" / "run.json").read_text())
    assert (before.fingerprint, before.notes) == (record["data"]["eval"]["fingerprint"], ())
    moved = project.rename(tmp_path / "moved")  # and moved
    after = evaluated(moved / "runs" / "a")
    assert [source.loss for source in after.sources] == [source.loss for source in before.sources]
    assert after.base_model == str(moved / "models" / "base")

    monkeypatch.chdir(moved)  # the same command where it is now
    again = train(settings, Recorder())
    assert (again.output, again.steps, again.adapter) == (Path("runs/a"), result.steps, Path("runs/a/adapter"))

    # The base was moved: the error says where it was looked for.
    base = (moved / "models" / "base").rename(tmp_path / "base")
    with pytest.raises(ModelNotFoundError) as caught:
        find_model(ModelSettings(name=str(moved / "runs" / "a")))
    for place in (project, moved):
        assert str(place / "models" / "base") in str(caught.value)
    assert "--base-model" in str(caught.value.hint)
    named = find_model(ModelSettings(name=str(moved / "runs" / "a"), base_model=str(base)))
    assert named.path == base
    asked = {"model": {"name": str(moved / "runs" / "a")}}
    with pytest.raises(ModelNotFoundError, match=str(moved / "models" / "base")):
        find_model_facts(resolved_in_code(EstimateSettings.model_validate(asked)), Recorder())
    asked["model"]["base_model"] = str(base)
    facts = find_model_facts(resolved_in_code(EstimateSettings.model_validate(asked)), Recorder())
    assert facts.path == base

    (moved / "held-out.jsonl").rename(tmp_path / "held-out.jsonl")  # and so was the data
    with pytest.raises(DatasetNotFoundError) as lost:
        evaluated(moved / "runs" / "a", **{"model.base_model": str(base)})
    for place in (project, moved):
        assert str(place / "held-out.jsonl") in str(lost.value)
    assert lost.value.exit_code == 2


def test_a_run_resumes_with_its_base_under_another_name(tmp_path: Path, rows: Path) -> None:
    base = Path(shutil.copytree(ASSETS / "base", tmp_path / "base"))
    changed = {"training__max_steps": 4, "training__save_steps": 1}
    first = train(short_settings(base, rows, tmp_path / "run", **changed), SignalAt(StepDone, 2))
    moved = base.rename(tmp_path / "moved")
    result = train(short_settings(moved, rows, tmp_path / "run", **changed), Recorder())
    assert (result.steps, result.resumed_from_step) == (4, first.steps)
    with pytest.raises(SettingsError, match=r"model\.name"):
        train(short_settings(tmp_path / "run" / "adapter", rows, tmp_path / "run", **changed), Recorder())


def test_a_base_that_differs_from_that_of_the_run_is_reported(base_model: Path, rows: Path, tmp_path: Path) -> None:
    train(short_settings(base_model, rows, tmp_path / "run", training__max_steps=1), Recorder())
    other = Path(shutil.copytree(base_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    recorder = Recorder()
    model = {"name": str(tmp_path / "run"), "base_model": str(other), "device": "cpu"}
    plan_load(resolved_in_code(LoadSettings.model_validate({"model": model})), recorder)
    assert f"{other} is not the base that {tmp_path / 'run'} was trained on" in notes_of(recorder)
    copy = Path(shutil.copytree(base_model, tmp_path / "copy"))
    recorder = Recorder()
    plan_load(resolved_in_code(LoadSettings.model_validate({"model": {**model, "base_model": str(copy)}})), recorder)
    assert "is not the base" not in notes_of(recorder)
