"""Names of data sets: their files or repository, sample and weight."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from qlora_cli.data.finding.sources import DatasetSource, check_dataset_name, find_dataset
from qlora_cli.data.reading.readers import read_rows
from qlora_cli.errors import DataError, DatasetNotFoundError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of several kinds of files, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.csv", "c.parquet", "deep/er/d.tsv", ".hidden.jsonl", "notes.txt", "e.json.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


def files_of(name: str | Path) -> list[str]:
    return [str(path) for path in find_dataset(str(name)).files]


def refusal(name: str) -> DataError | DatasetNotFoundError:
    problem = check_dataset_name(name)
    assert isinstance(problem, DataError | DatasetNotFoundError)
    assert problem.hint
    return problem


def test_names_are_checked_without_the_libraries_that_read_data() -> None:
    heavy = {"torch", "datasets", "pyarrow", "numpy"}
    code = f"import sys, qlora_cli.data.finding.sources; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "JSONL", "csv.xz"])
def test_every_file_type_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_text("x")
    assert find_dataset(str(path)) == DatasetSource(name=str(path), files=(path,))
    assert find_dataset(str(path)).is_local


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (".", ["a.csv", "b.jsonl", "c.parquet", "e.json.gz"]),
        ("*", ["a.csv", "b.jsonl", "c.parquet", "e.json.gz"]),
        ("[ab].*", ["a.csv", "b.jsonl"]),
        ("?.jsonl", ["b.jsonl"]),
        ("**", ["a.csv", "b.jsonl", "c.parquet", "deep/er/d.tsv", "e.json.gz"]),
        ("deep/**/*.tsv", ["deep/er/d.tsv"]),
        ("./b.jsonl", ["b.jsonl"]),
        ("~/b.jsonl", ["~/b.jsonl"]),
        ("~/[b].jsonl", ["~/b.jsonl"]),
    ],
)
def test_directories_and_globs_give_their_files_sorted(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(data))
    assert files_of(name) == [file.replace("~", str(data)) for file in files]


@pytest.mark.parametrize(
    "pattern", ["**/*.tsv", "**", "d*/**/er/**/*.tsv", "**/**/*.tsv", "**/er/*", "deep/er/**/d.*"]
)
def test_a_glob_follows_links_but_visits_each_directory_once(data: Path, pattern: str) -> None:
    for number in range(3):
        (data / "deep" / f"loop{number}").symlink_to(data)
        (data / "deep" / "er" / f"back{number}").symlink_to("..")
    assert [name for name in files_of(pattern) if name.endswith(".tsv")] == ["deep/er/d.tsv"]


def test_a_linked_directory_is_read_once_and_a_hidden_one_is_not(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere[1]")
    (elsewhere / "far.tsv").write_text("x")
    (data / ".hidden").mkdir()
    (data / ".hidden" / "h.tsv").write_text("x")
    for name in ("a1", "a2"):
        (data / name).symlink_to(elsewhere)
    assert files_of("**/*.tsv") == ["a1/far.tsv", "deep/er/d.tsv"]
    assert files_of(f"{data}/**/*.tsv") == [f"{data}/a1/far.tsv", f"{data}/deep/er/d.tsv"]
    assert files_of(".hidden/**/*.tsv") == [".hidden/h.tsv"]


@pytest.mark.parametrize(
    ("options", "num_rows", "weight"),
    [
        ("", None, "1"),
        ("#5", 5, "1"),
        ("*2", None, "2"),
        ("*0.5", None, "1/2"),
        ("*.25", None, "1/4"),
        ("*1000", None, "1000"),
        ("#500*2.5", 500, "5/2"),
    ],
)
@pytest.mark.parametrize("name", ["b.jsonl", ".", "*.csv", "[ab].*", "owner/name", "owner/name::train[:10%]"])
def test_sample_and_weight_follow_every_kind_of_name(
    data: Path, name: str, options: str, num_rows: int | None, weight: str
) -> None:
    assert data == Path.cwd()
    plain, source = find_dataset(name), find_dataset(name + options)
    assert (source.files, source.repository, source.split) == (plain.files, plain.repository, plain.split)
    assert (source.name, source.num_rows, source.weight) == (name + options, num_rows, Fraction(weight))


@pytest.mark.parametrize("real", ["a.jsonl*2.jsonl", "a#5.jsonl", "a.jsonl#5", "b[1].jsonl"])
def test_a_file_with_the_whole_name_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b1.jsonl", real):
        Path(name).write_text("x")
    if real == "a.jsonl#5":
        assert "file type that is not supported" in str(refusal(real))
    else:
        assert files_of(real) == [real]
        assert find_dataset(f"{real}#7*3").num_rows == 7
        assert files_of(f"{real}#7*3") == [real]


def test_a_weight_is_not_a_glob_over_sibling_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("x")
    Path("a.jsonl.bz2").write_text("x")
    assert files_of("a.jsonl*2") == ["a.jsonl"]
    assert files_of("a.jsonl*") == ["a.jsonl", "a.jsonl.bz2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("squad", ("squad", None, None, None)),
        ("owner/name@v1", ("owner/name", "v1", None, None)),
        ("owner/name@refs/convert/parquet:en", ("owner/name", "refs/convert/parquet", "en", None)),
        ("owner/name:en:validation", ("owner/name", None, "en", "validation")),
        ("owner/name::validation", ("owner/name", None, None, "validation")),
        ("owner/name::train[:10%]+test[5:]", ("owner/name", None, None, "train[:10%]+test[5:]")),
        ("o.w-n_er/na.me@" + "0a" * 20 + ":c.1:s", ("o.w-n_er/na.me", "0a" * 20, "c.1", "s")),
    ],
)
def test_a_hub_id_is_parsed(name: str, expected: tuple[str | None, ...]) -> None:
    source = find_dataset(name)
    assert (source.repository, source.revision, source.config, source.split) == expected
    assert not source.is_local


@pytest.mark.parametrize(
    "name",
    [
        *("none.jsonl", "none.csv.gz", "./none", "../none", "/none", "~/none", "a/b/c"),
        "none.jsonl#5*2",
        "none.jsonl*2",
        "owner/name.parquet",
        "owner/name.csv:en",
        "no ne",
        "owner/name@",
    ],
)
def test_a_name_like_a_path_is_not_requested_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    problem = refusal(name)
    assert isinstance(problem, DatasetNotFoundError)
    assert str(problem) == f"no data set at {name}: no such file"


@pytest.mark.parametrize("name", ["none*", "none/?", "owner/[n]ame", "*.bz3", "\0*", "~nobody/*", "~/*.jsonl"])
@pytest.mark.parametrize("options", ["", "#5", "*2", "#5*2"])
def test_a_glob_without_matches_is_named_without_sample_and_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    problem = refusal(name + options)
    assert isinstance(problem, DatasetNotFoundError)
    assert str(problem) == f"no file matches {name}"
    assert "pattern" in str(problem.hint)


@pytest.mark.parametrize(
    "options", ["#0", "#-3", "#half", "#1.5", "#", "*0", "*-1", "*0.0", "*1001", "*1.2.3", "#5*0"]
)
@pytest.mark.parametrize("name", ["b.jsonl", "owner/name"])
def test_an_invalid_sample_or_weight_is_refused(data: Path, name: str, options: str) -> None:
    assert data == Path.cwd()
    problem = refusal(name + options)
    assert isinstance(problem, DataError)
    assert str(problem).startswith(f"{name}{options}: '")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("b.json", "b.jsonl"),
        ("e.json", "e.json.gz"),
        ("./a.jsonl", "a.csv"),
        ("deep/err.jsonl", "deep/er"),
        ("./newss.jsonl", "news.jsonl"),
        ("b.json#5*2", "b.jsonl"),
    ],
)
def test_a_missing_file_is_an_error_that_names_the_most_similar_one(data: Path, name: str, near: str) -> None:
    (data / "news.jsonl").write_text("x")
    assert refusal(name).hint == f"Did you mean {near}?"


def test_a_missing_hub_id_is_an_error_that_names_a_similar_local_file(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (data / "deep" / "train.jsonl").write_text("x")
    for name, near in (("deep/trian", "deep/train.jsonl"), ("b", "b.jsonl")):
        with pytest.raises(DatasetNotFoundError) as caught:
            list(read_rows(find_dataset(name), split="train", seed=0))
        assert caught.value.hint == f"Did you mean {near}, which is on this disk?"


def test_a_git_lfs_pointer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    for name in (path, tmp_path, f"{tmp_path}/*"):
        problem = refusal(str(name))
        assert "Git LFS pointer" in str(problem)
        assert "git lfs pull" in str(problem.hint)


def test_sample_and_weight_in_the_wrong_order_get_a_hint(data: Path) -> None:
    assert data == Path.cwd()
    assert "b.jsonl#5*2" in str(refusal("b.jsonl*2#5").hint)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("notes.txt", "notes.txt is of a file type that is not supported", ".jsonl"),
        ("*.txt", "*.txt matches no data: 1 matches (notes.txt for one)", "**/*.jsonl"),
        ("deep", "deep holds no data", "deep/er"),
        ("void", "void holds no data", "path"),
        ("empty.jsonl", "empty.jsonl is empty", "at least one row"),
        ("empty.*", "empty.jsonl is empty", "at least one row"),
        (
            "outside.parquet.gz",
            "outside.parquet.gz: a .parquet file can't be read when it is compressed as a whole",
            ".gz",
        ),
        ("outside.*", "outside.parquet.gz: a .parquet file can't be read when it is compressed as a whole", ".gz"),
        ("/dev/null", "/dev/null is neither a file nor a directory", ".jsonl"),
    ],
)
def test_a_path_that_is_not_data_is_named(data: Path, name: str, message: str, hint: str) -> None:
    (data / "void").mkdir()
    (data / "empty.jsonl").touch()
    (data / "outside.parquet.gz").write_text("x")
    problem = refusal(name)
    assert isinstance(problem, DataError)
    assert str(problem).startswith(message)
    assert hint in str(problem.hint)


def test_an_empty_file_in_a_directory_is_an_error(data: Path) -> None:
    (data / "deep/er/empty.csv").touch()
    assert "empty.csv is empty" in str(refusal("deep/er"))


def test_names_that_are_not_utf8_are_found_and_printable(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_text("x")
    assert find_dataset(str(tmp_path)).files == (path,)
    path.write_text("")
    assert str(refusal(str(tmp_path))) == f"{tmp_path}/caf\ufffd.jsonl is empty"


def test_the_output_of_save_to_disk_is_read_without_metadata_and_caches(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "saved" / "train"
    (folder / "cache-0123456789abcdef.arrow").write_text("x")  # of a map over the loaded data
    arrow = folder / "data-00000-of-00001.arrow"
    assert {path.name for path in folder.iterdir()} > {"state.json", "dataset_info.json"}
    assert find_dataset(str(folder)).files == (arrow,)
    assert find_dataset(str(tmp_path / "saved" / "**")).files == (arrow,)
    assert find_dataset(str(tmp_path / "saved")).files == (arrow,)
