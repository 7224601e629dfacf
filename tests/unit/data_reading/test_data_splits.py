"""The splits of a directory: layouts of the hub, output of `datasets`, file names; and the notes on them."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets import data_files
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.finding.sources import check_dataset_name, find_dataset, find_split
from qlora_cli.data.finding.split_names import SEPARATORS, SPLIT_WORDS, splits_in_name
from qlora_cli.data.opening.train_and_eval import held_out_sources, overlapping_source, source_notes, trained_sources
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from tests.support.data.data_directories import files_of, notes_of, refusal


def test_the_keywords_of_splits_are_those_of_datasets() -> None:
    assert {split: list(words) for split, words in SPLIT_WORDS.items()} == {
        str(split): words for split, words in data_files.SPLIT_KEYWORDS.items()
    }
    assert SEPARATORS == data_files.NON_WORDS_CHARS


LAYOUTS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "shards": (
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
        {
            "train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            "test": ["test-00000-of-00001.jsonl"],
        },
    ),
    "shards in data": (
        [
            "data/train-00000-of-00001-0a1b.jsonl",
            "data/unsupervised-00000-of-00001.jsonl",
            "data/test-00000-of-00001.jsonl",
        ],
        {
            "train": ["data/train-00000-of-00001-0a1b.jsonl"],
            "unsupervised": ["data/unsupervised-00000-of-00001.jsonl"],
            "test": ["data/test-00000-of-00001.jsonl"],
        },
    ),
    "files": (
        ["train.jsonl", "dev.jsonl", "test.jsonl"],
        {"train": ["train.jsonl"], "validation": ["dev.jsonl"], "test": ["test.jsonl"]},
    ),
    "files with more in their names": (
        ["my_train_v2.jsonl", "my-val.1.jsonl", "2024 eval.jsonl"],
        {"train": ["my_train_v2.jsonl"], "validation": ["my-val.1.jsonl"], "test": ["2024 eval.jsonl"]},
    ),
    "folders": (
        ["train/a.jsonl", "train/en/b.jsonl", "evaluation/a.jsonl", "valid/train.jsonl"],
        {
            "train": ["train/a.jsonl", "train/en/b.jsonl"],
            "test": ["evaluation/a.jsonl"],
            "validation": ["valid/train.jsonl"],
        },
    ),
    "folders in data": (
        ["data/training/a.jsonl", "data/testing/a.jsonl"],
        {"train": ["data/training/a.jsonl"], "test": ["data/testing/a.jsonl"]},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_has_the_files_that_datasets_reads(make_directory: Callable[..., str], layout: str) -> None:
    names, splits = LAYOUTS[layout]
    path = make_directory(*names)
    data_files = datasets.load_dataset_builder(path).config.data_files
    assert {
        str(split): [str(Path(file).relative_to(path)) for file in data_files[split]] for split in data_files
    } == splits
    for split, files in splits.items():
        assert files_of(path, split) == files_of(f"{path}::{split}") == files
        assert find_dataset(path, split).split == split


@pytest.mark.parametrize(
    ("names", "read", "aside"),
    [
        (["Train.jsonl", "Test.jsonl"], ["Train.jsonl"], "test (Test.jsonl)"),
        (["a.jsonl", "b.jsonl", "test.jsonl"], ["a.jsonl", "b.jsonl"], "test (test.jsonl)"),
        (["train.jsonl", "extra.jsonl"], ["train.jsonl"], "extra.jsonl (of no split, or metadata)"),
        (["a.jsonl", "metadata.csv"], ["a.jsonl"], "metadata.csv (of no split, or metadata)"),
        (["a.jsonl", "eval/x.jsonl", "eval/y.jsonl"], ["a.jsonl"], "test (2 files)"),
        (
            ["train_a.jsonl", "train_b.jsonl", "val.jsonl"],
            ["train_a.jsonl", "train_b.jsonl"],
            "validation (val.jsonl)",
        ),
        (["data/a.jsonl", "data/dev.jsonl"], ["data/a.jsonl"], "validation (dev.jsonl)"),
        (["a.jsonl", "data/b.jsonl"], ["a.jsonl"], "folder data (1 file)"),
        (["a.jsonl", "other/test.jsonl"], ["a.jsonl"], "folder other (1 file)"),
        (["a.jsonl", "sub/train.jsonl", "sub/deep/test.jsonl"], ["a.jsonl"], "folder sub (2 files)"),
        (["data/train.jsonl", "raw/x.jsonl"], ["data/train.jsonl"], "folder raw (1 file)"),
        (["data/train.jsonl", "data/raw/x.jsonl"], ["data/train.jsonl"], "folder raw (1 file)"),
        (["train/a.jsonl", "raw/x.jsonl"], ["train/a.jsonl"], "folder raw (1 file)"),
        (["data/train.jsonl", "stats.json"], ["data/train.jsonl"], "stats.json (of no split, or metadata)"),
        (["default/train/0.jsonl", "default/test/0.jsonl"], ["default/train/0.jsonl"], "test (0.jsonl)"),
        (
            ["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"],
            ["train_sft-00000-of-00001.jsonl"],
            "test_sft",
        ),
    ],
)
def test_only_train_is_read_and_the_rest_is_reported(
    make_directory: Callable[..., str], names: list[str], read: list[str], aside: str
) -> None:
    path = make_directory(*names)
    assert files_of(path) == read
    (note,) = notes_of(path)
    assert f"not read: {aside}" in note


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("trainset", "devset", "testset"),
        ("TrainSet", "DevSet", "TestSet"),
        ("traindata", "valdata", "testData"),
        ("trainRows", "validRows", "testRows"),
        ("squadTrain", "squadDev", "squadTest"),
        ("my-trainset.v1", "my-valset.v1", "my-testset.v1"),
        ("trainfile", "valfile", "evalfile"),
    ],
)
def test_keywords_are_found_within_compound_words(
    make_directory: Callable[..., str], train: str, validation: str, test: str
) -> None:
    path = make_directory(f"{train}.jsonl", f"{validation}.jsonl", f"{test}.jsonl")
    assert files_of(path) == [f"{train}.jsonl"]
    assert files_of(path, "validation") == [f"{validation}.jsonl"]
    assert files_of(path, "test") == [f"{test}.jsonl"]


def test_a_link_to_a_folder_above_is_not_reported_as_unread(make_directory: Callable[..., str]) -> None:
    path = make_directory("a.jsonl")
    (Path(path) / "up").symlink_to(Path(path).parent)
    assert notes_of(path) == []


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonl"],
        ["latest.jsonl", "attested.jsonl", "devices.jsonl", "evals.jsonl"],
        ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
        ["metadata.jsonl"],
        ["a.jsonl", "dataset_infos.json", "config.json", "other/notes.md"],
        ["testament.jsonl", "Devices.jsonl", "trains.jsonl", "myDevices.jsonl"],
    ],
)
def test_a_directory_without_split_names_is_read_as_a_whole(
    make_directory: Callable[..., str], names: list[str]
) -> None:
    path = make_directory(*names)
    read = sorted(name for name in names if "/" not in name and name.endswith(".jsonl"))
    assert files_of(path) == files_of(path, "validation") == read
    assert find_dataset(path).split is None
    assert notes_of(path) == []


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["test.jsonl", "dev.jsonl"], "train", "no split train; it holds validation (dev.jsonl), test (test.jsonl)"),
        (["train.jsonl"], "validation", "no split validation; it holds train (train.jsonl)"),
        (
            ["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"],
            "train",
            "train_gen and train_sft for the split train",
        ),
        (["train_test.jsonl", "test.jsonl"], "train", "train_test.jsonl may be of train or of another split"),
        (["train-test.jsonl"], "train", "train-test.jsonl may be of train or of another split"),
        (["train.jsonl"], "train[:10%]", "no split train[:10%]"),
    ],
)
def test_a_missing_split_is_an_error_that_names_the_others(
    make_directory: Callable[..., str], names: list[str], split: str, message: str
) -> None:
    assert message in str(refusal(make_directory(*names), split))


def test_the_split_that_a_hint_proposes_is_read(make_directory: Callable[..., str]) -> None:
    path = make_directory("test.jsonl", "dev.jsonl")
    hint = refusal(path).hint or ""
    assert hint == f"Name one of them: {path}::validation"
    assert files_of(hint.removeprefix("Name one of them: ")) == ["dev.jsonl"]
    (Path(path) / "test.jsonl").rename(Path(path) / "train.jsonl")
    assert refusal(path, "test").hint == f"Name one of them: {path}::validation"


def test_an_ambiguous_file_does_not_prevent_reading_another_split(make_directory: Callable[..., str]) -> None:
    path = make_directory("train-test.jsonl", "train.jsonl", "validation.jsonl")
    assert files_of(path, "dev") == ["validation.jsonl"]
    assert "train-test.jsonl (of ambiguous splits)" in notes_of(f"{path}::validation")[0]


def test_sample_and_weight_follow_the_split(make_directory: Callable[..., str]) -> None:
    source = find_dataset(f"{make_directory('train.jsonl', 'test.jsonl')}::test#5*2")
    assert (source.split, source.num_rows, str(source.weight)) == ("test", 5, "2")


def test_a_file_has_no_splits(make_directory: Callable[..., str]) -> None:
    path = make_directory("a.jsonl")
    assert "is one file" in str(refusal(f"{path}/a.jsonl::test"))
    assert "has no splits" in str(refusal(f"{path}::test"))
    assert "has no config en" in str(refusal(f"{path}:en"))
    for name in (path, f"{path}/a.jsonl"):
        with pytest.raises(DataError, match="it has no splits"):
            find_split(name, "validation")


def test_a_path_with_colons_takes_precedence_over_config_and_split(tmp_path: Path) -> None:
    (tmp_path / "a::test").mkdir()
    (tmp_path / "a::test" / "b.jsonl").write_text("x")
    assert find_dataset(f"{tmp_path}/a::test").files == (tmp_path / "a::test" / "b.jsonl",)


def test_the_requested_split_of_a_saved_dict_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    top = tmp_path / "set"
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(top)
    (top / "train" / "cache-my.arrow").write_text("x")
    (top / "train" / "other.arrow").write_text("x")
    assert files_of(str(top)) == ["train/data-00000-of-00001.arrow"]
    assert files_of(f"{top}::test") == ["test/data-00000-of-00001.arrow"]
    assert "not read: test (data-00000-of-00001.arrow)" in notes_of(str(top))[0]
    (top / "test" / "data-00000-of-00001.arrow").unlink()
    assert files_of(str(top)) == ["train/data-00000-of-00001.arrow"]
    assert "data-00000-of-00001.arrow can't be read: No such file" in str(refusal(f"{top}::test"))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"splits": 5, "_data_files": ["a"]}', "[" * 100_000])
def test_a_file_that_is_only_named_like_metadata_changes_nothing(
    make_directory: Callable[..., str], name: str, content: str
) -> None:
    path = make_directory("train.jsonl", "test.jsonl")
    (Path(path) / name).write_text(content)
    assert files_of(path) == ["train.jsonl"]


@pytest.mark.parametrize(
    "name", ["\0", "a\0.arrow", "\ud800.arrow", "x" * 300 + ".arrow", "..", "", "/", 5, None, ["a"]]
)
def test_metadata_with_invalid_file_names_changes_nothing(make_directory: Callable[..., str], name: object) -> None:
    path = make_directory("train.jsonl", "test.jsonl")
    (Path(path) / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (Path(path) / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    (Path(path) / "dataset_info.json").write_text(json.dumps({"splits": {str(name): 5}}))
    assert files_of(path) == ["train.jsonl"]


@pytest.mark.parametrize("name", ["README.md", "state.json", "dataset_dict.json", "dataset_info.json", "other.jsonl"])
def test_a_pipe_in_a_directory_is_not_waited_for(make_directory: Callable[..., str], name: str) -> None:
    path = make_directory("train.jsonl", "test.jsonl")
    os.mkfifo(Path(path) / name)
    assert files_of(path) == ["train.jsonl"]


def test_a_pipe_that_a_saved_data_set_names_as_its_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    os.mkfifo(tmp_path / "data.arrow")
    assert "data.arrow can't be read: it is no file" in str(refusal(str(tmp_path)))


@pytest.fixture
def cached(make_directory: Callable[..., str], tmp_path: Path) -> Path:
    """The cache of `datasets` after it read a directory with two splits, and mapped them."""
    path = make_directory("train.jsonl", "test.jsonl")
    loaded = datasets.load_dataset(path, cache_dir=str(tmp_path / "cache" / "set"))
    loaded.map(lambda row: {"more": row["text"]})
    return tmp_path / "cache" / "set"


def test_map_results_in_the_cache_of_datasets_are_not_read(cached: Path) -> None:
    folder = next(cached.rglob("dataset_info.json")).parent
    assert sorted(path.name.partition("-")[0] for path in folder.glob("*.arrow")) == ["cache", "cache", "set", "set"]
    for name in (folder, folder.parent, cached):
        assert [Path(file).name for file in files_of(str(name))] == ["set-train.arrow"]
        assert [Path(file).name for file in files_of(f"{name}::test")] == ["set-test.arrow"]
        assert "not read: test (set-test.arrow)" in notes_of(str(name))[0]


def test_one_of_several_data_sets_in_a_cache_must_be_named(cached: Path) -> None:
    folder = next(cached.rglob("dataset_info.json")).parent
    other = folder.with_name("0" * 16)
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    hint = refusal(str(cached)).hint or ""
    assert str(folder) in hint
    assert str(other) in hint


def test_folders_of_several_configs_are_named(make_directory: Callable[..., str]) -> None:
    path = make_directory("en/train/0.jsonl", "en/test/0.jsonl", "more/de/a.jsonl", "docs/x.txt")
    problem = refusal(path)
    assert "holds no data" in str(problem)
    assert problem.hint == f"Its subfolders do; give one: {path}/en, {path}/more/de"


def test_shards_in_a_cache_belong_to_their_split(make_directory: Callable[..., str]) -> None:
    names = ["n-train-00000-of-00002.arrow", "n-train-00001-of-00002.arrow", "n-pretrain.arrow", "n-train_x.arrow"]
    path = make_directory(*names)
    splits = {name: {"name": name} for name in ("train", "pretrain", "train_x")}
    (Path(path) / "dataset_info.json").write_text(json.dumps({"splits": splits}))
    assert files_of(path) == names[:2]
    assert files_of(path, "pretrain") == ["n-pretrain.arrow"]


# Notes


def test_named_files_of_several_splits_are_all_read_with_a_note(make_directory: Callable[..., str]) -> None:
    path = make_directory("train.jsonl", "test.jsonl", "train/a.jsonl", "b.jsonl")
    for names in (
        [f"{path}/*"],
        [f"{path}/train.jsonl", f"{path}/test.jsonl"],
        [f"{path}/t*.jsonl", f"{path}/b.jsonl"],
    ):
        (note,) = notes_of(*names)
        assert "named after several splits are all trained on: test (test.jsonl), train (train.jsonl)" in note
    assert notes_of(f"{path}/train*") == notes_of(f"{path}/test.jsonl") == []


def test_missing_shards_are_reported(make_directory: Callable[..., str]) -> None:
    path = make_directory("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    for name in (path, f"{path}/*"):
        assert notes_of(name) == [f"{path}: 1 of 3 files are missing, train-00001-of-00003 for one"]
    make_directory("train-00001-of-00003.jsonl")
    assert notes_of(path) == notes_of(f"{path}/train-00000-of-00003.jsonl") == []


def test_a_split_that_is_evaluated_is_not_reported_as_unread(make_directory: Callable[..., str]) -> None:
    path = make_directory("train.jsonl", "val.jsonl", "test.jsonl")
    (note,) = notes_of(path, eval_split="dev")
    assert note == f"{path}: reading train (train.jsonl) and validation (val.jsonl); not read: test (test.jsonl)"
    assert notes_of(path, eval_dataset=[f"{path}::validation"]) == [note]
    assert [source.split for source in held_out_sources(DataSettings(dataset=(path,), eval_split="5%"))] == []


@pytest.mark.parametrize(
    ("trained", "evaluated", "is_same"),
    [
        ("train.jsonl", "./train.jsonl", True),
        ("*.jsonl", "*.jsonl", True),
        ("train.jsonl", "*.jsonl", True),
        ("train.jsonl#5", "train.jsonl", True),
        ("*.jsonl", "train.jsonl", False),
        ("train.jsonl", "train.jsonl#5", False),
        ("train.jsonl", "test.jsonl", False),
        (".", ".", False),
        ("owner/name", "owner/name", False),
        ("owner/name", "owner/name::train", True),
        ("owner/name@v1", "owner/name::train", False),
        ("owner/name::test", "owner/name", True),
    ],
)
def test_data_that_is_both_trained_and_held_out_is_detected(
    make_directory: Callable[..., str], monkeypatch: pytest.MonkeyPatch, trained: str, evaluated: str, is_same: bool
) -> None:
    monkeypatch.chdir(make_directory("train.jsonl", "test.jsonl"))
    data = DataSettings(dataset=(trained,), eval_dataset=(evaluated,))
    overlap = overlapping_source(trained_sources(data), held_out_sources(data), data)
    assert (overlap is not None) == is_same


STEMS = st.sampled_from(
    [
        "a",
        "train",
        "my-train.1",
        "Test",
        "dev_2",
        "evaluation",
        "x_val",
        "train-test",
        "data",
        "metadata",
        "latest",
        "testset",
        "trainData",
    ]
)
NAMES = st.tuples(st.sampled_from(["", "", "", "data/", "train/", "test_2/", "other/"]), STEMS).map("".join)


@given(names=st.sets(NAMES, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_no_file_of_another_split_is_trained_and_each_is_read_or_reported(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        for name in names:
            (top / name).parent.mkdir(exist_ok=True)
            (top / f"{name}.jsonl").write_text("{}")
        if check_dataset_name(folder) is not None:
            return
        source = find_dataset(folder)
        directory = source.directory
        assert directory is not None
        for path in source.files:
            named_splits = [splits_in_name(part) for part in path.relative_to(top).parts if splits_in_name(part)]
            assert named_splits[:1] in ([], [{"train"}])
        by_split = [path for split in directory.splits for path in split.files]
        known = {*source.files, *by_split, *directory.ambiguous, *directory.unassigned, *directory.files}
        left = {path for path in top.rglob("*.jsonl") if path not in known}
        assert {path.parent.name for path in left} <= {"data", "other"}
        assert all(any(folder in path.parents for folder in directory.folders) for path in left)
        (note,) = source_notes([source], []) or ("",)
        assert bool(note) == bool(left | known - set(source.files))
