"""The weights of a run, however it was stopped, killed, resumed or damaged; determined without loading a model."""

import json
import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest

from qlora_cli import writing
from qlora_cli.errors import ModelError, OutputDirectoryError
from qlora_cli.runs.checkpoints import TRAINER_STATE, damage_of, seal
from qlora_cli.runs.checksums import checksums_of
from qlora_cli.runs.directory import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    RunDirectory,
    clear_startup_files,
    has_only_startup_files,
)
from qlora_cli.runs.history import read_history
from qlora_cli.runs.record import load_record, read_record
from qlora_cli.runs.run_weights import RunWeights, is_complete, may_have_weights, weights_of, weights_of_part
from qlora_cli.settings.models import OutputSettings
from qlora_cli.training.resuming.resume import find_resume, output_problem


def make_run(
    path: Path,
    *,
    status: str,
    steps: int | None,
    adapter: bool,
    good: tuple[int, ...] = (),
    damaged: tuple[int, ...] = (),
    record: Mapping[str, object] | None = None,
) -> RunDirectory:
    """Write a run of 10 steps; `steps` is in its result, `good` and `damaged` are its checkpoints."""
    run = RunDirectory(path)
    run.create()
    result = {} if steps is None else {"result": {"steps": steps}}
    run.run_file.write_text(json.dumps({"status": status, "plan": {"num_steps": 10}, **result, **(record or {})}))
    for step in (*good, *damaged):
        checkpoint = run.checkpoints / f"step-{step}"
        checkpoint.mkdir()
        (checkpoint / TRAINER_STATE).write_text("{}")
        seal(checkpoint)
        if step in damaged:
            (checkpoint / TRAINER_STATE).write_text("[]")
    if adapter:
        fill_adapter(run.adapter)
    return run


def fill_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text("{}")
    (folder / ADAPTER_WEIGHTS).write_text("weights")


def find_weights(run: RunDirectory) -> RunWeights:
    return weights_of(run, load_record(run.path))


def test_the_weights_of_a_run_that_ended_are_its_adapter(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done", steps=10, adapter=True, good=(8, 10))
    weights = find_weights(run)
    assert (weights.path, weights.step, weights.num_steps) == (run.adapter, 10, 10)
    assert weights.is_done
    assert weights.is_result
    assert weights.sentence == "the weights are those of step 10 of 10, with which the run ended"
    assert is_complete(run, load_record(run.path))


def test_the_weights_of_a_stopped_run_are_the_adapter_of_that_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="interrupted", steps=5, adapter=True, good=(4, 5))
    weights = find_weights(run)
    assert (weights.path, weights.step, weights.is_done, weights.is_result) == (run.adapter, 5, False, False)
    assert "step 5 of 10; the run has not ended" in weights.sentence


# As written by a version that left the adapter/ of an earlier stop in place: the record says that the run continued.
@pytest.mark.parametrize("status", ["running", "failed"])
def test_the_adapter_of_an_earlier_stop_never_passes_for_a_later_state(tmp_path: Path, status: str) -> None:
    run = make_run(tmp_path, status=status, steps=None, adapter=True, good=(3, 6, 8))
    weights = find_weights(run)
    assert (weights.path, weights.step, weights.is_done) == (run.checkpoints / "step-8", 8, False)
    part = weights_of_part(run.adapter, run, load_record(run.path))
    assert (part.step, part.is_done) == (None, False)
    assert "of an unknown step" in part.sentence


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="running", steps=None, adapter=False, good=(2, 4), damaged=(6, 8))
    weights = find_weights(run)
    assert weights.step == 4
    assert [damage.split(":")[0] for damage in weights.damaged] == ["step-8", "step-6"]


def test_a_run_without_weights_is_an_error_that_names_damaged_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running", steps=None, adapter=False, damaged=(2,))
    assert may_have_weights(run)
    with pytest.raises(
        ModelError, match=r"has no weights any more.*1 checkpoint can't be used \(step-2: trainer_state"
    ):
        find_weights(run)
    empty = make_run(tmp_path / "b", status="failed", steps=None, adapter=False)
    assert not may_have_weights(empty)
    with pytest.raises(ModelError, match="has no weights yet"):
        find_weights(empty)


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "done"])
@pytest.mark.parametrize("damaged", [(), (2,)])
@pytest.mark.parametrize("left", [None, ADAPTER_WEIGHTS, ADAPTER_CONFIG])
def test_the_command_is_proposed_again_only_where_it_restarts(
    tmp_path: Path, status: str, damaged: tuple[int, ...], left: str | None
) -> None:
    run = make_run(tmp_path, status=status, steps=10, adapter=False, damaged=damaged)
    if left is not None:
        run.adapter.mkdir()
        (run.adapter / left).write_text("{}")
    with pytest.raises(ModelError, match="has no weights") as caught:
        find_weights(run)
    output = OutputSettings(directory=run.path)
    try:
        restarts = find_resume(output) is not None
    except OutputDirectoryError:
        restarts = False
    assert ("same qlora train command" in str(caught.value.hint)) is restarts
    assert ("train into another --output" in str(caught.value.hint)) is not restarts
    assert ("yet" in str(caught.value)) is restarts


def test_the_weights_of_a_done_run_without_an_adapter_are_its_last_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done", steps=10, adapter=False, good=(8, 10))
    weights = find_weights(run)
    assert (weights.step, weights.is_done, weights.is_result) == (10, True, True)
    assert not is_complete(run, load_record(run.path))


@pytest.mark.parametrize("left", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE, ".DS_Store"])
def test_a_folder_without_a_complete_adapter_is_not_an_adapter(tmp_path: Path, left: str) -> None:
    run = make_run(tmp_path, status="done", steps=10, adapter=False, good=(10,))
    run.adapter.mkdir()
    (run.adapter / left).touch()
    assert (find_weights(run).path, find_weights(run).is_result) == (run.checkpoints / "step-10", True)
    assert not is_complete(run, load_record(run.path))
    assert run.holds_adapter_weights == left.startswith("adapter_model")
    (run.adapter / ADAPTER_CONFIG).touch()
    assert run.has_adapter == run.holds_adapter_weights


def test_removing_a_linked_adapter_removes_the_link_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="interrupted", steps=4, adapter=False, good=(4,))
    fill_adapter(tmp_path / "elsewhere")
    run.adapter.symlink_to(tmp_path / "elsewhere")
    assert find_weights(run).path == run.adapter
    run.remove_adapter(())
    assert not run.adapter.is_symlink()
    assert (tmp_path / "elsewhere" / ADAPTER_WEIGHTS).read_text() == "weights"
    for exists in (True, False):  # a folder is removed whole, and a missing one is no error
        if exists:
            fill_adapter(run.adapter)
        assert run.remove_adapter([{}, checksums_of(run.adapter), {"tokenizer.json": {}}]) is None
        assert {path.name for path in run.path.iterdir()} == {"run.json", "checkpoints"}


def test_an_adapter_with_a_file_of_the_user_is_moved_aside_instead_of_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="interrupted", steps=4, adapter=False, good=(4,))
    mine = run.path / ".adapter.dropped"  # the name that an adapter once had while it was deleted
    mine.mkdir()
    moved_to = []
    for _ in range(2):
        fill_adapter(run.adapter)
        sums = checksums_of(run.adapter)
        (run.adapter / "thesis").touch()
        place = run.remove_adapter([sums])
        assert place is not None
        moved_to.append(place)
        assert not run.adapter.exists()
    assert moved_to[0] == run.path / "adapter-kept"
    assert moved_to[1] != moved_to[0]
    assert all((place / "thesis").exists() and (place / ADAPTER_WEIGHTS).exists() for place in moved_to)
    assert mine.is_dir()


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
@pytest.mark.parametrize("content", ["my notes", ""])
def test_an_adapter_with_an_edited_file_is_moved_aside_instead_of_removed(
    tmp_path: Path, name: str, content: str
) -> None:
    run = make_run(tmp_path / "run", status="interrupted", steps=4, adapter=True, good=(4,))
    (run.adapter / "README.md").write_text("card")
    sums = checksums_of(run.adapter)
    (run.adapter / name).write_text(content)
    place = run.remove_adapter([sums, {name: {"bytes": 3}}, {name: 5}])
    assert place == run.path / "adapter-kept"
    assert (place / name).read_text() == content
    assert (place / "README.md").read_text() == "card"


def test_a_done_run_that_loaded_its_best_model_has_the_weights_of_that_step(tmp_path: Path) -> None:
    best = {"settings": {"training": {"load_best_model_at_end": True}}, "result": {"steps": 10, "best_step": 6}}
    run = make_run(tmp_path / "a", status="done", steps=None, adapter=True, good=(6, 10), record=best)
    assert (find_weights(run).path, find_weights(run).step, find_weights(run).is_result) == (run.adapter, 6, True)
    no_adapter = make_run(tmp_path / "b", status="done", steps=None, adapter=False, good=(6, 10), record=best)
    assert (find_weights(no_adapter).step, find_weights(no_adapter).is_result) == (6, True)
    no_best_step = make_run(
        tmp_path / "c", status="done", steps=None, adapter=False, good=(10,), damaged=(6,), record=best
    )
    assert (find_weights(no_best_step).step, find_weights(no_best_step).is_result) == (10, False)
    assert "the run ended with others" in find_weights(no_best_step).sentence


def test_the_newest_good_state_is_used_in_any_combination(tmp_path: Path) -> None:
    """For every combination: no state older than a good checkpoint, unless the run ended with it."""
    states = product(
        ("running", "failed", "interrupted", "done"), (False, True), ((), (4,), (4, 8)), ((), (9,)), (None, 4, 8)
    )
    num_cases = 0
    for number, (status, adapter, good, damaged, steps) in enumerate(states):
        run = make_run(tmp_path / str(number), status=status, steps=steps, adapter=adapter, good=good, damaged=damaged)
        if not adapter and not good:
            with pytest.raises(ModelError):
                find_weights(run)
            continue
        weights = find_weights(run)
        num_cases += 1
        if status == "done" and steps is not None and (adapter or steps in good):
            assert (weights.step, weights.is_result) == (steps, True)
            assert (weights.path == run.adapter) == adapter
            continue
        known = steps if adapter and status in {"interrupted", "done"} else None
        newest = max((*good, *((known,) if known is not None else ())), default=None)
        assert weights.step == newest, (status, adapter, good, damaged, steps)
        assert weights.is_done == (status == "done")
        assert weights.path.is_dir()
    assert num_cases > 100


def test_a_folder_next_to_the_checkpoints_has_an_unknown_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="running", steps=None, adapter=False, good=(2,))
    other = run.checkpoints / ".damaged-step-1"
    assert weights_of_part(other, run, load_record(run.path)).step is None
    assert weights_of_part(run.checkpoints / "step-2", run, load_record(run.path)).step == 2


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints", "run.lock", "skipped_rows_of_stream.jsonl", "tensorboard", "mlflow.db"]
)
def test_a_run_with_a_link_in_place_of_its_files_is_not_resumed(tmp_path: Path, name: str) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.write_text("precious")
    run.mkdir()
    (run / name).symlink_to(elsewhere)
    problem = output_problem(OutputSettings(directory=run))
    assert problem is not None
    assert f"{run / name} is a link" in str(problem)
    assert problem.exit_code == 2
    assert problem.hint
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock", "skipped_rows_of_stream.jsonl", "mlflow.db"])
def test_a_run_with_a_file_of_another_user_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / name
    file.write_text("theirs")
    if os.getuid() == 0:
        os.chown(file, 54321, -1)
    else:
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        monkeypatch.setattr(writing, "_owner_of_new", lambda _: other)
    problem = output_problem(OutputSettings(directory=tmp_path))
    assert problem is not None
    assert f"{file} belongs to another user" in str(problem)
    assert problem.hint
    assert file.read_text() == "theirs"


@pytest.mark.parametrize("kind", ["another name", "no file"])
def test_a_run_with_a_hard_link_or_a_pipe_is_not_resumed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "run").mkdir()
    if kind == "no file":
        os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    else:
        (tmp_path / "run" / "metrics.jsonl").hardlink_to(tmp_path / "elsewhere")
    assert kind in str(output_problem(OutputSettings(directory=tmp_path / "run")))


def test_pipes_in_a_run_are_rejected_without_waiting(tmp_path: Path) -> None:
    for name in ("run.json", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
    assert read_record(tmp_path).problems == ("run.json is no file",)
    with pytest.raises(OSError, match="is no file"):
        read_history(tmp_path)
    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "checksums.json")
    assert damage_of(checkpoint) == "checksums.json is no file"
    (checkpoint / "checksums.json").unlink()
    os.mkfifo(checkpoint / "pipe")
    (checkpoint / "checksums.json").write_text('{"pipe": {"bytes": 0, "sha256": ""}}')
    assert damage_of(checkpoint) == "pipe is no file"


@pytest.mark.parametrize("name", ["pipe", "link to itself", "link to nothing", "endless"])
def test_anything_but_a_file_in_a_checkpoint_is_damage_with_or_without_a_checksum(tmp_path: Path, name: str) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    seal(tmp_path)
    assert damage_of(tmp_path) is None
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to({"link to itself": name, "endless": "/dev/zero"}.get(name, "nothing"))
    assert damage_of(tmp_path) == f"{name} is no file"
    sums = json.loads((tmp_path / "checksums.json").read_text())
    (tmp_path / "checksums.json").write_text(json.dumps({name: {"bytes": 0, "sha256": ""}, **sums}))
    assert damage_of(tmp_path) is not None


@pytest.mark.parametrize("content", ["[" * 100_000, "sparse"], ids=["deep", "large"])
def test_records_that_are_too_large_or_too_deep_are_not_read(tmp_path: Path, content: str) -> None:
    for name in ("checksums.json", "run.json"):
        (tmp_path / name).write_text(content)
        if content == "sparse":
            os.truncate(tmp_path / name, 2**40)
    assert "checksums.json can't be read" in str(damage_of(tmp_path))
    assert "run.json is damaged" in read_record(tmp_path).problems[0]


def test_a_run_whose_checkpoints_are_not_a_folder_is_not_resumed(tmp_path: Path) -> None:
    for make in (os.mkfifo, Path.touch):
        make(tmp_path / "checkpoints")
        assert "checkpoints is no folder" in str(output_problem(OutputSettings(directory=tmp_path)))
        (tmp_path / "checkpoints").unlink()


def test_files_of_the_user_are_not_startup_files_and_are_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "thesis").mkdir(parents=True)
    (tmp_path / "checkpoints" / "thesis" / "t").write_text("mine")
    assert not has_only_startup_files(tmp_path, is_copying=True)
    clear_startup_files(tmp_path, (), ())
    assert (tmp_path / "checkpoints" / "thesis" / "t").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert not has_only_startup_files(other, is_copying=True)
    (other / "metrics.jsonl").write_text('{"event": "step_done"}\n')
    (other / "checkpoints" / "step-1").mkdir(parents=True)
    (other / "checkpoints" / "step-1" / "checksums.json").write_text("{}")
    assert has_only_startup_files(other, is_copying=True)
    clear_startup_files(other, {"metrics.jsonl"}, ())  # which existed before
    assert [path.name for path in other.iterdir()] == ["metrics.jsonl"]
