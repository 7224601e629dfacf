"""A run resumes in a directory with files of its user: none of them is lost, and those in the way are reported."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Noted, PhaseStarted, StepDone
from qlora_cli.training.train_run import train
from qlora_cli.writing import write_directory, write_file
from tests.conftest import Recorder, short_settings
from tests.support.processes.killed_runs import Killed, kill_after

FAST = {
    **{"training__max_steps": 5, "training__save_steps": 1, "training__gradient_accumulation_steps": 1},
    **{"output__max_checkpoints": 1},
}


def notes_of(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, Noted)]


def killed_in(write: Callable[[], None]) -> None:
    """Write in a process that is killed right before something gets its name."""

    def child() -> None:
        def kill(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = Path.rename = kill  # type: ignore[method-assign, assignment]
        write()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def run(base_model: Path, rows: Path, tmp_path: Path) -> Path:
    """A run that was killed after its second step."""
    kill_after(short_settings(base_model, rows, tmp_path / "run", **FAST), 2)
    return tmp_path / "run"


def test_user_files_in_a_resumed_run_are_kept_and_reported(base_model: Path, rows: Path, run: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-2", run / "adapter", ignore=shutil.ignore_patterns("checksums.json"))
    mine = {
        run / "adapter" / "thesis": run / "adapter-kept" / "thesis",
        checkpoints / "step-2" / "thesis": checkpoints / "step-2" / "thesis",
        checkpoints / ".saving" / "whole" / "thesis": checkpoints / ".saving" / "whole" / "thesis",
        checkpoints / ".deleting" / "thesis": checkpoints / ".deleting" / "thesis",
        run / ".adapter.dropped" / "thesis": run / ".adapter.dropped" / "thesis",
    }
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
    recorder = Recorder()
    assert train(short_settings(base_model, rows, run, **FAST), recorder).resumed_from_step == 2
    assert {path: place.read_text() for path, place in mine.items()} == {path: str(path) for path in mine}
    assert (run / "adapter-kept" / "adapter_model.safetensors").is_file()
    assert not (run / "adapter" / "thesis").exists()
    assert {path.name for path in checkpoints.iterdir()} == {".saving", ".deleting", "step-2", "step-5"}
    notes = [note for note in notes_of(recorder) if "thesis" in note or "adapter-kept" in note]
    assert notes == [
        f"{run / 'adapter'} was not as the run wrote it: see {run / 'adapter-kept'}",
        f"{checkpoints / 'step-2'} is not deleted: it holds thesis, which no run wrote",
    ]


@pytest.mark.parametrize("name", ["README.md", None])
def test_the_adapter_of_a_resumed_run_is_kept_only_if_it_was_edited(
    base_model: Path, rows: Path, tmp_path: Path, name: str | None
) -> None:
    class Stopper(Recorder):
        def report(self, event: Any) -> None:
            if isinstance(event, StepDone) and event.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings, adapter = short_settings(base_model, rows, tmp_path / "run", **FAST), tmp_path / "run" / "adapter"
    assert train(settings, Stopper()).interrupted_by is not None
    if name is not None:
        assert (adapter / name).is_file()
        (adapter / name).write_text("my notes")
    assert train(settings, Recorder()).steps == 5
    kept_adapter = tmp_path / "run" / "adapter-kept"
    assert kept_adapter.exists() == (name is not None)
    if name is not None:
        assert (kept_adapter / name).read_text() == "my notes"


def test_an_adapter_is_its_runs_own_as_soon_as_it_is_in_place(base_model: Path, rows: Path, tmp_path: Path) -> None:
    class KilledOnceWritten(Recorder):
        def report(self, event: Any) -> None:
            if isinstance(event, PhaseStarted) and event.title == "Checking the adapter":
                raise Killed

    settings, run = short_settings(base_model, rows, tmp_path / "run", **FAST), tmp_path / "run"
    with pytest.raises(Killed):
        train(settings, KilledOnceWritten())
    assert (run / "adapter").is_dir()
    recorder = Recorder()
    assert train(settings, recorder).steps == 5
    assert (run / "adapter").is_dir()
    assert not (run / "adapter-kept").exists()
    assert not [note for note in notes_of(recorder) if "adapter-kept" in note]


@pytest.mark.parametrize("is_done", [False, True], ids=["resumed", "done"])
def test_what_a_killed_run_left_unfinished_is_deleted_and_a_users_files_are_not(
    base_model: Path, rows: Path, run: Path, *, is_done: bool
) -> None:
    settings = short_settings(base_model, rows, run, **FAST)
    if is_done:
        train(settings, Recorder())
    before = {path.relative_to(run) for path in run.rglob("*")}
    for name in ("run.json", "metrics.jsonl", "report.html", "held_out_losses.json"):
        killed_in(partial(write_file, run / name, "{}"))
    for folder in (run / "adapter", run / "base", run / "checkpoints" / "step-5"):
        killed_in(partial(write_directory, folder, lambda path: (path / "weights").touch()))
    left = {path for path in run.rglob("*.saving") if path.relative_to(run) not in before}
    assert len(left) == 7
    mine = (run / ".run.json.saving", run / ".thesis.saving", run / ".thesis.0123456789abcdef.saving.txt")
    for path in mine:
        path.write_text("mine")
    link = run / ".run.json.0123456789abcdef.saving"
    link.symlink_to(rows)
    assert train(settings, Recorder()).steps == 5
    assert {path for path in run.rglob("*.saving*") if path.relative_to(run) not in before} == {*mine, link}
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_a_checkpoint_beyond_the_limit_is_deleted_where_nothing_is_left_to_save(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    settings, checkpoints = (
        short_settings(base_model, rows, tmp_path / "run", **FAST),
        tmp_path / "run" / "checkpoints",
    )
    kill_after(settings, 5)
    shutil.copytree(checkpoints / "step-5", checkpoints / "step-4")  # as if killed before this one was deleted
    assert train(settings, Recorder()).resumed_from_step == 5
    assert [path.name for path in checkpoints.iterdir()] == ["step-5"]


def test_files_added_to_a_run_while_it_trains_are_kept_and_reported(base_model: Path, rows: Path, run: Path) -> None:
    places = (run / "adapter", run / "checkpoints" / "step-4", run / "checkpoint-now")

    class Busy(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            if isinstance(event, StepDone) and event.step == 3:
                for place in places:
                    place.mkdir()
                    (place / "thesis").write_text("mine")

    recorder = Busy()
    assert train(short_settings(base_model, rows, run, **FAST), recorder).steps == 5
    kept_places = (run / "adapter-kept", run / "checkpoints" / ".kept-step-4", run / "checkpoint-now")
    assert [(place / "thesis").read_text() for place in kept_places] == ["mine"] * 3
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    notes = [note for note in notes_of(recorder) if "kept" in note]
    assert notes == [
        f"{kept_places[1]} is not deleted: it has no checksums.json that can be read",
        f"another program wrote {run / 'adapter'}, which is now {kept_places[0]}",
    ]


def test_user_files_in_copied_checkpoints_are_kept_when_the_run_resumes_again(
    base_model: Path, rows: Path, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    # As a process leaves them that is killed right after copying.
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    (other / "checkpoints" / "step-2" / "thesis").write_text("mine")
    recorder = Recorder()
    settings = short_settings(base_model, rows, other, **FAST, output__resume=str(run))
    assert train(settings, recorder).resumed_from_step == 2
    kept_checkpoint = other / "checkpoints" / ".kept-step-2"
    assert (kept_checkpoint / "thesis").read_text() == "mine"
    assert f"{kept_checkpoint} is not deleted: it holds thesis, which no run wrote" in notes_of(recorder)
