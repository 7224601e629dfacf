"""The folder of a run's checkpoints: the run deletes its old ones, and never what anybody else put there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.runs.checkpoints import CHECKSUMS_FILE, TRAINER_STATE, CheckpointStore, damage_of, list_checkpoints
from qlora_cli.writing import MARK, WHOLE


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return CheckpointStore(folder, num_kept=2, needed_bytes=0, journal=tmp_path / "metrics.jsonl")


def save(store: CheckpointStore, *steps: int) -> dict[Path, str]:
    """Save checkpoints as training does; return the checkpoints that the last one did not delete."""
    not_deleted: dict[Path, str] = {}
    for step in steps:
        store.clear_leftovers()
        with store.staging(step) as place:
            finished = place / f"checkpoint-{step}"
            (finished / "folder").mkdir(parents=True)
            (finished / "folder" / "weights").write_text(f"weights {step}")
            (finished / TRAINER_STATE).write_text("{}")
            published = store.publish(finished, step, best_step=None)
        assert published.path == store.path_of(step)
        assert damage_of(published.path) is None
        not_deleted = published.not_deleted
    return not_deleted


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_the_oldest_checkpoints_are_deleted_without_leftovers(store: CheckpointStore) -> None:
    assert save(store, 1, 2, 3, 4) == {}
    assert names(store) == ["step-3", "step-4"]


@pytest.mark.parametrize("held", ["thesis", MARK])
@pytest.mark.parametrize(
    "name",
    [
        ".saving",
        ".deleting",
        ".step-1.1-a.saving",
        ".step-1.1-0123456789abcdef.saving",
        ".damaged-step-3",
        ".kept-step-3",
    ],
)
def test_a_folder_of_the_user_stays_whatever_its_name(store: CheckpointStore, name: str, held: str) -> None:
    mine = store.folder / name
    mine.mkdir()
    (mine / held).touch()
    (mine / "thesis").touch()
    save(store, 1, 2, 3)
    (moved,) = store.move_damaged_aside(2)
    assert moved.name.startswith(".damaged-step-3")
    assert (moved / "folder" / "weights").read_text() == "weights 3"
    save(store, 3, 4)
    assert {path.name for path in mine.iterdir()} == {held, "thesis"}
    assert names(store) == sorted([name, moved.name, "step-3", "step-4"])


def test_a_second_damaged_checkpoint_does_not_replace_the_first_one_set_aside(store: CheckpointStore) -> None:
    moved = []
    for _ in range(2):
        save(store, 5)
        moved += store.move_damaged_aside(4)
    assert moved[0].name == ".damaged-step-5"
    assert len({*moved}) == 2
    assert all((path / "folder" / "weights").exists() for path in moved)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("notes.txt", "it holds notes.txt, which no run wrote"),
        ("folder/notes.txt", "it holds folder/notes.txt, which no run wrote"),
        (f"{CHECKSUMS_FILE}.mine", "it holds checksums.json.mine, which no run wrote"),
        (CHECKSUMS_FILE, "it has no checksums.json that can be read"),
    ],
)
def test_an_old_checkpoint_with_a_file_of_the_user_stays_and_is_reported(
    store: CheckpointStore, name: str, reason: str
) -> None:
    save(store, 1)
    (store.path_of(1) / name).write_text("mine")
    assert save(store, 2, 3, 4) == {store.path_of(1): reason}
    assert (store.path_of(1) / name).read_text() == "mine"
    assert names(store) == ["step-1", "step-3", "step-4"]


@pytest.mark.parametrize("content", ["my notes", "weights 7", ""], ids=["longer", "as long", "empty"])
def test_an_old_checkpoint_with_an_edited_file_stays_and_is_reported(store: CheckpointStore, content: str) -> None:
    save(store, 1)
    edited = store.path_of(1) / "folder" / "weights"
    edited.write_text(content)
    reason = "folder/weights in it was changed since it was written"
    assert save(store, 2, 3, 4) == {store.path_of(1): reason}
    assert edited.read_text() == content
    assert names(store) == ["step-1", "step-3", "step-4"]
    assert store.free_path(1) == {store.folder / ".kept-step-1": reason}


@pytest.mark.parametrize("digits", [19, 250])
def test_a_folder_with_an_impossible_step_number_is_not_a_checkpoint(store: CheckpointStore, digits: int) -> None:
    odd = store.folder / f"step-{'9' * digits}"
    odd.mkdir()
    assert save(store, 1, 2, 3) == {}
    assert store.move_damaged_aside(2) == [store.folder / ".damaged-step-3"]
    assert odd in store.folder.iterdir()
    assert [path.name for path in list_checkpoints(store.folder)] == ["step-2"]


def test_a_folder_or_a_link_named_like_a_checkpoint_stays(store: CheckpointStore, tmp_path: Path) -> None:
    (store.folder / "step-1").mkdir()
    (store.folder / "step-1" / "thesis").touch()
    (store.folder / "step-2").symlink_to(tmp_path)
    (store.folder / "step-3").write_text("thesis")
    not_deleted = save(store, 4, 5, 6)
    assert {path.name: reason.split()[1] for path, reason in not_deleted.items()} == {
        **{"step-1": "has", "step-2": "is", "step-3": "has"}
    }
    assert (store.folder / "step-1" / "thesis").exists()
    assert names(store) == ["step-1", "step-2", "step-3", "step-5", "step-6"]


def test_anything_at_the_path_of_a_new_checkpoint_is_moved_aside_unless_a_run_wrote_it(store: CheckpointStore) -> None:
    (store.folder / "step-1").mkdir()
    (store.folder / "step-1" / "thesis").touch()
    assert save(store, 1) == {store.folder / ".kept-step-1": "it has no checksums.json that can be read"}
    assert (store.folder / ".kept-step-1" / "thesis").exists()
    assert save(store, 1) == {}
    assert names(store) == [".kept-step-1", "step-1"]


def test_an_old_checkpoint_with_missing_files_is_deleted(store: CheckpointStore) -> None:
    save(store, 1, 2)
    (store.path_of(1) / "folder" / "weights").unlink()
    (store.path_of(2) / TRAINER_STATE).unlink()
    assert save(store, 3, 4) == {}
    assert names(store) == ["step-3", "step-4"]


DIE = """
import os, shutil, sys
from pathlib import Path
from qlora_cli.runs.checkpoints import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), num_kept=1, needed_bytes=0, journal=Path("none"))
with store.staging(2) as place:
    (place / "checkpoint-2").mkdir()
    (place / "checkpoint-2" / "weights").touch()
    if sys.argv[2] == "writing":
        os._exit(9)
    shutil.rmtree = lambda place, **_: os.path.exists(place) and os._exit(9)
    store.publish(place / "checkpoint-2", 2, None)
"""


@pytest.mark.parametrize("while_", ["writing", "deleting"])
def test_leftovers_of_a_killed_process_are_not_checkpoints_and_are_deleted_by_the_next_save(
    store: CheckpointStore, while_: str
) -> None:
    save(store, 1)
    died = subprocess.run([sys.executable, "-c", DIE, store.folder, while_], check=False)
    assert died.returncode == 9
    left = [name for name in names(store) if name.endswith(".saving")]
    assert left
    assert all({path.name for path in (store.folder / name).iterdir()} <= {MARK, WHOLE} for name in left)
    assert [path.name for path in list_checkpoints(store.folder)] == ["step-1" if while_ == "writing" else "step-2"]
    # The writer in a restarted container has the same process id.
    own = store.folder / f".step-7.{os.getpid()}-a.saving"
    own.mkdir()
    (own / MARK).touch()
    (store.folder / ".step-7.1-0123456789abcdef.saving").mkdir()  # killed before it was marked
    save(store, 3)
    assert [name for name in names(store) if name.startswith(".")] == []
