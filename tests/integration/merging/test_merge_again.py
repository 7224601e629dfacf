"""A second merge into the same place: its own result is recognized, another one is replaced only on request."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs.merge_command import UNCOMPARED, copy_run, merged, qlora_merge, refused, trained_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("again"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return copy_run(trained, tmp_path / "own")


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_same_merge_again_is_recognized_and_writes_nothing(run: Path) -> None:
    first = merged(run)
    before = contents(run / "merged")
    again = merged(run)
    assert contents(run / "merged") == before
    record = json.loads((run / "merged" / "merge.json").read_text())
    assert (first.pop("already_merged_at"), again.pop("already_merged_at")) == (None, record["written"])
    changing = ("total_seconds", "notes")
    assert {key: value for key, value in again.items() if key not in changing} == {
        key: value for key, value in first.items() if key not in changing
    }
    assert again["notes"][-1] == (f"{run / 'merged'} already holds this merge, written {record['written']}")
    text = qlora_merge(run)
    assert f"  before    {record['written']}: nothing was left to do" in text.stdout
    assert "next: vllm serve" in text.stderr


def damage_adapter(run: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def damage_base(run: Path) -> None:
    """Change the base and what the run knows of it, as a run on another base would."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    weights = Path(config["base_model_name_or_path"]) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def damage_result(run: Path) -> None:
    with (run / "merged" / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def forget_request(run: Path) -> None:
    file = run / "merged" / "merge.json"
    record = json.loads(file.read_text())
    del record["request"]
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("options", "change", "expected"),
    [
        (("--dtype", "fp32"), None, "made with merge.dtype keep, not merge.dtype fp32"),
        (("--base", "dequantized"), None, "made with merge.base original, not merge.base dequantized"),
        (("--format", "nf4"), None, "made with merge.formats hf, not merge.formats nf4"),
        (("--weight", "0.5"), None, "its adapters have other weights in the sum"),
        (("--verify",), None, "it was not verified (--no-verify)"),
        ((), damage_adapter, "merged from other weights than"),
        ((), damage_base, "merged into another base than"),
        ((), damage_result, "are not those that it wrote"),
        ((), forget_request, "does not say how it was requested"),
    ],
)
def test_another_merge_is_refused_in_one_message_until_it_may_replace_the_earlier_one(
    run: Path, options: tuple[str, ...], change: object, expected: str
) -> None:
    merged(run, *UNCOMPARED)
    if callable(change):
        change(run)
    before = contents(run / "merged")
    flags = (*(flag for flag in UNCOMPARED if not (flag == "--no-verify" and "--verify" in options)), *options)
    message = refused(run, *flags)
    assert expected in message
    assert "--overwrite" in message
    assert contents(run / "merged") == before


def test_overwriting_replaces_every_file_of_the_earlier_merge(run: Path, tmp_path: Path) -> None:
    merged(run, *UNCOMPARED, "--format", "hf", "--format", "nf4")
    assert sorted(path.name for path in (run / "merged").iterdir()) == ["hf", "nf4"]
    done = merged(run, *UNCOMPARED, "--overwrite", "--dtype", "fp32")
    assert done["already_merged_at"] is None
    fresh = merged(run, *UNCOMPARED, "--output", tmp_path / "fresh", "--dtype", "fp32")
    assert fresh["dtype"] == "float32"
    names = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in (run / "merged").iterdir()} == names
    weights = [(place / "model.safetensors").read_bytes() for place in (run / "merged", tmp_path / "fresh")]
    assert weights[0] == weights[1]
    assert merged(run, *UNCOMPARED, "--dtype", "fp32")["already_merged_at"] is not None


@pytest.mark.parametrize("name", ["notes.txt", "more/notes.txt"])
def test_overwriting_never_deletes_what_a_merge_did_not_write(run: Path, name: str) -> None:
    merged(run, *UNCOMPARED)
    mine = run / "merged" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert f"contains other files than the merge there wrote ({name})" in refused(run, *UNCOMPARED, "--overwrite")
    shutil.rmtree(run / "merged")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "contains other files" in refused(run, *UNCOMPARED, "--overwrite")
    assert mine.read_text() == "mine"


def test_a_merge_that_fails_leaves_the_earlier_one(run: Path) -> None:
    merged(run, *UNCOMPARED)
    before = contents(run / "merged")
    done = qlora_merge(run, "--overwrite", "--base", "original", "--max-divergence", "0", "--device", "cpu")
    assert done.exit_code == 1
    assert contents(run / "merged") == before
    assert (run / "merged-failed-verification" / "config.json").is_file()


def test_overwriting_an_empty_place_is_a_merge(run: Path) -> None:
    assert merged(run, *UNCOMPARED, "--overwrite")["already_merged_at"] is None
