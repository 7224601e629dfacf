"""The record of a run: written and read by one model, of this version and of those before, moved or damaged."""

import json
import shutil
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.model_files.merge_record import MERGE_SCHEMA_VERSION, new_merge_record, read_merge_record
from qlora_cli.runs.checkpoints import TRAINER_STATE, seal
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.record import (
    SCHEMA_VERSION,
    RunRecord,
    load_record,
    new_record,
    read_record,
    recorded_path,
    resumption,
    write_record,
)
from qlora_cli.runs.run_result import PeakMemory, TrainResult
from qlora_cli.settings.models import OutputSettings
from qlora_cli.training.resuming.resume import find_resume, output_problem
from tests.support.runs.run_directories import a_record

VERSION_0 = Path(__file__).parents[2] / "records_of_version_0"  # as qlora wrote them before records had a version


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VERSION_0, tmp_path / "old"))


def change(run: Path, **content: object) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | content))


def test_a_record_of_version_0_is_read_as_intended(old_run: Path) -> None:
    record = load_record(old_run)
    assert (record.schema_version, record.problems, record.status, record.is_done) == (0, (), "done", True)
    assert record.result is not None
    assert (record.result.steps, record.plan.num_steps, record.seed) == (6, 6, 0)
    base = record.base()
    assert (base.name, base.commit, base.candidate_paths) == (
        "/home/ann/project/base",
        None,
        (Path("/home/ann/project/base"),),
    )
    assert record.settings_of("quantization", "how")["method"] == "nf4"
    assert record.setting("data.dataset") == ["/home/ann/project/train.jsonl"]
    assert record.data.train is not None
    assert record.data.train.integer("rows_trained") == 1500
    assert (record.data.train.fingerprint or "").startswith("ae6790")
    assert record.base_model is not None
    assert sum(record.base_model.dtype_bytes.values()) > 0
    summary = read_run(old_run).summary
    assert (summary.state, summary.step, summary.num_steps, summary.problems) == ("done", 6, 6, ())
    assert summary.model == "/home/ann/project/base"


def test_paths_of_a_version_0_result_are_those_of_its_present_directory(old_run: Path) -> None:
    (old_run / "checkpoints" / "step-6").mkdir(parents=True)
    result = TrainResult.of_run(RunDirectory(old_run), load_record(old_run))
    assert result is not None
    assert (result.output, result.adapter, result.steps) == (old_run, old_run / "adapter", 6)
    assert result.checkpoints == (old_run / "checkpoints" / "step-6",)


@pytest.mark.parametrize("field", fields(TrainResult), ids=lambda field: str(field.name))
@pytest.mark.parametrize("damage", ["missing", {"x": 1}])
def test_a_result_with_a_missing_or_damaged_field_is_read(old_run: Path, field: Field[Any], damage: object) -> None:
    whole = TrainResult.of_run(RunDirectory(old_run), load_record(old_run))
    assert whole is not None
    written = {key: value for key, value in WHOLE["result"].items() if key != field.name}
    change(old_run, result=written if damage == "missing" else {**written, field.name: damage})
    result = TrainResult.of_run(RunDirectory(old_run), load_record(old_run))
    assert result is not None
    assert replace(result, **{field.name: getattr(whole, field.name)}) == whole
    own = {"output": old_run, "adapter": old_run / "adapter", "steps": 6, "num_steps": 6}
    host = PeakMemory(host_bytes=0, device_allocated_bytes=None, device_reserved_bytes=None)
    known = {**own, "peak_memory": host, "checkpoints": (), "notes": ()}
    assert getattr(result, field.name) in ((known[field.name],) if field.name in known else (None, 0))


def test_an_empty_result_counts_all_planned_steps(old_run: Path) -> None:
    change(old_run, result={})
    result = TrainResult.of_run(RunDirectory(old_run), load_record(old_run))
    assert result is not None
    assert (result.steps, result.num_steps, result.final_loss, result.num_tokens) == (6, 6, None, 0)
    change(old_run, result=None)
    assert TrainResult.of_run(RunDirectory(old_run), load_record(old_run)) is None


def test_a_merge_record_of_version_0_is_read_as_intended() -> None:
    record = read_merge_record(VERSION_0)
    assert record is not None
    assert (record.schema_version, record.format, record.base) == (0, "hf", "dequantized")
    assert [(one.name, one.weight, one.step) for one in record.adapters] == [("old", 1.0, None)]
    assert record.data[0].rows_trained == 1500


def test_a_written_record_is_read_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    written = new_record(directory, {**a_record("interrupted"), "unknown": {"kept": [1, None]}})
    write_record(directory, written)
    read = load_record(tmp_path)
    assert read == written
    assert (read.schema_version, read.status) == (SCHEMA_VERSION, "interrupted")
    content = json.loads((tmp_path / "run.json").read_text())
    assert {key: content[key] for key in a_record("interrupted")} == json.loads(json.dumps(a_record("interrupted")))
    assert content["unknown"] == {"kept": [1, None]}
    assert (read.updated(status="done").status, read.status) == ("done", "interrupted")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_a_record_of_a_newer_version_says_so(old_run: Path, version: object) -> None:
    change(old_run, schema_version=version)
    with pytest.raises(ModelError, match=rf"run\.json is of schema version {version}") as caught:
        load_record(old_run)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "Update qlora: pip install -U qlora-cli"
    assert read_run(old_run).summary.problems  # a list of runs continues
    problem = output_problem(OutputSettings(directory=old_run))
    assert problem is not None
    assert problem.hint == "Update qlora: pip install -U qlora-cli, or choose another --output."


@pytest.mark.parametrize("version", ["2", None, True, 1.5, [1]])
def test_a_version_that_is_not_a_whole_number_is_damage(old_run: Path, version: object) -> None:
    change(old_run, schema_version=version)
    with pytest.raises(
        ModelError, match=r"run\.json is damaged: schema_version is .*, which is no whole number"
    ) as no:
        load_record(old_run)
    assert json.dumps(version) in str(no.value)
    assert no.value.hint == "Restore run.json as qlora train wrote it"
    problem = output_problem(OutputSettings(directory=old_run))
    assert problem is not None
    assert problem.hint == "Restore run.json as qlora train wrote it, or choose another --output."


def test_a_merge_record_of_a_newer_version_or_a_damaged_one_says_so(tmp_path: Path) -> None:
    assert read_merge_record(tmp_path) is None
    for content, message in (
        ({"schema_version": MERGE_SCHEMA_VERSION + 1}, "is of schema version"),
        ({"adapters": 3}, "is damaged: adapters"),
        ([], "is damaged"),
    ):
        (tmp_path / "merge.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=message) as caught:
            read_merge_record(tmp_path)
        assert caught.value.hint
    (tmp_path / "merge.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        read_merge_record(tmp_path)
    assert new_merge_record({"base": "original"}).schema_version == MERGE_SCHEMA_VERSION


def places(content: Any, *path: str) -> list[tuple[str, ...]]:
    """Return every place in a JSON object."""
    here = [path] if path else []
    below = content.items() if isinstance(content, dict) else ()
    return here + [place for key, value in below for place in places(value, *path, key)]


WHOLE = json.loads((VERSION_0 / "run.json").read_text())


@pytest.mark.parametrize("damage", [17.5, -1, "x", None, [], ["x"], {"x": 1}, [{"step": "x"}], {"x": {"x": []}}])
def test_the_rest_of_a_damaged_record_is_read_without_a_crash(old_run: Path, damage: object) -> None:
    for place in places(WHOLE):
        content = json.loads(json.dumps(WHOLE))
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = damage
        (old_run / "run.json").write_text(json.dumps(content))
        record = read_record(old_run)
        if place != ("schema_version",):
            assert place[0] == "settings" or record.setting("training.max_steps") == 6
            assert place[0] in {"status", "result"} or record.status == "done"
        read_run(old_run)


@pytest.mark.parametrize("key", ["base_model", "base_model_path", "settings"])
def test_a_command_that_needs_a_missing_value_names_file_and_key(old_run: Path, key: str) -> None:
    content = {name: value for name, value in WHOLE.items() if name != key}
    (old_run / "run.json").write_text(json.dumps(content))
    record = load_record(old_run)
    need = record.base if key != "settings" else lambda: record.settings_of("model", "what the run was based on")
    with pytest.raises(ModelError) as caught:
        need()
    assert str(caught.value).startswith(f"{old_run / 'run.json'} does not say what the run was based on")
    assert key in str(caught.value)


def test_relative_names_resolve_from_the_original_and_the_moved_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(project)
    directory = RunDirectory(Path("runs/a"))
    base = {"base_model": {"base_model": "models/base"}, "base_model_path": project / "models" / "base"}
    write_record(directory, new_record(directory, {"status": "done", **base}))
    monkeypatch.chdir(tmp_path)
    moved = project.rename(tmp_path / "moved")
    record = load_record(moved / "runs" / "a")
    assert record.candidate_paths("rows.jsonl") == (project / "rows.jsonl", moved / "rows.jsonl")
    assert record.candidate_paths("/rows.jsonl") == record.candidate_paths("~/rows.jsonl") == ()
    assert record.base().candidate_paths == (project / "models" / "base", moved / "models" / "base")


def test_relative_names_in_a_version_0_record_resolve_by_its_output_directory(tmp_path: Path) -> None:
    run = Path(shutil.copytree(VERSION_0, tmp_path / "project" / "runs" / "old"))
    for output, candidates in (
        ("runs/old", (tmp_path / "project" / "rows.jsonl",)),
        ("./runs/old/", (tmp_path / "project" / "rows.jsonl",)),
        ("elsewhere/old", ()),
        ("/runs/old", ()),
        ("../old", ()),
    ):
        change(run, settings={**WHOLE["settings"], "output": {"directory": output}})
        assert load_record(run).candidate_paths("rows.jsonl") == candidates


@pytest.mark.parametrize(
    ("prompts", "error", "is_private"),
    [(None, None, False), ([], None, False), (["What ails me?"], None, True), (None, "rows.jsonl, row 7: …", True)],
)
def test_a_record_that_may_quote_rows_or_prompts_is_readable_by_its_owner_only(
    tmp_path: Path, prompts: list[str] | None, error: str | None, is_private: bool
) -> None:
    (tmp_path / "usual").touch()
    content = a_record("failed", error=error)
    content["settings"]["training"]["sample_prompts"] = prompts
    for _ in range(2):
        write_record(RunDirectory(tmp_path), new_record(RunDirectory(tmp_path), content))
        modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("run.json", "usual")]
        assert modes[0] == (0o600 if is_private else modes[1])


def test_paths_of_the_run_are_recorded_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(Path("run"))
    assert recorded_path(directory, Path("run/checkpoints/step-2")) == Path("checkpoints/step-2")
    assert recorded_path(directory, tmp_path / "run") == Path()
    assert recorded_path(directory, Path("other/checkpoints/step-2")) == tmp_path / "other/checkpoints/step-2"


def test_a_resumed_run_recognises_its_origin_after_both_moved(tmp_path: Path) -> None:
    project = tmp_path / "project"
    first, second = RunDirectory(project / "first"), RunDirectory(project / "second")
    for run in (first, second):
        run.create()
        for step in (3, 4):
            checkpoint = run.checkpoints / f"step-{step}"
            checkpoint.mkdir()
            (checkpoint / TRAINER_STATE).write_text("{}")
            seal(checkpoint)
    entry = resumption(second, "now", 3, first.checkpoints / "step-3")
    own = resumption(second, "now", 4, second.checkpoints / "step-4")
    assert (entry.checkpoint, entry.from_run) == (first.checkpoints / "step-3", Path("../first/checkpoints/step-3"))
    assert (own.checkpoint, own.from_run) == (Path("checkpoints/step-4"), None)
    assert resumption(second, "now", 0, None).checkpoint is None
    write_record(first, new_record(first, a_record("interrupted")))
    write_record(second, new_record(second, {**a_record("running"), "resumed": [entry.content, own.content]}))
    for place in (project, tmp_path / "moved"):
        if place != project:
            project.rename(place)
        again = OutputSettings(directory=place / "second", resume=str(place / "first" / "checkpoints" / "step-3"))
        assert output_problem(again) is None
        resume = find_resume(again)
        assert resume is not None
        assert (resume.run.path, resume.step) == (
            place / "second",
            4,
        )  # from its own checkpoint, and no longer from the other's
        other = OutputSettings(directory=place / "second", resume=str(place / "first" / "checkpoints" / "step-4"))
        assert "already holds a run, other than the one" in str(output_problem(other))


def test_a_missing_record_is_empty_with_a_reason(tmp_path: Path) -> None:
    record = read_record(tmp_path)
    assert (record.content, record.problems) == ({}, ("there is no run.json",))
    assert RunRecord().settings_used == ()


@pytest.mark.parametrize("name", ["x" * 5_000, "x\0y"])
def test_an_impossible_file_name_in_a_record_is_harmless(name: str) -> None:
    record = RunRecord.model_validate({"resumed": [{"step": 1, "checkpoint": name, "from_run": ".."}]})
    assert len(record.checkpoint_candidates(record.resumed[0])) == 2
