"""A cached result depends on all the code that computes it."""

import os
from pathlib import Path

import pytest

from qlora_cli import cache
from qlora_cli.data.tokenizing import encode
from qlora_cli.errors import UsageError
from qlora_cli.memory import prediction_cache
from tests.support.models.predictions import REPORT
from tests.support.source.source_imports import imports_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    for name in ("one/a.py", "one/below/deeper/b.py", "other/c.py", "single.py", "one/page.html.jinja"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.mark.parametrize("changed", ["one/a.py", "one/below/deeper/b.py", "single.py"])
def test_code_at_any_depth_counts(package: Path, changed: str) -> None:
    before = cache.code_digests(("one", "single.py"))
    (package / changed).write_text("changed")
    assert cache.code_digests(("one", "single.py")) != before


@pytest.mark.parametrize("changed", ["other/c.py", "one/page.html.jinja"])
def test_other_parts_and_templates_of_pages_do_not_count(package: Path, changed: str) -> None:
    before = cache.code_digests(("one", "single.py"))
    (package / changed).write_text("changed")
    assert cache.code_digests(("one", "single.py")) == before


@pytest.mark.parametrize("name", ["QLORA_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_whose_name_is_not_utf_8_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("QLORA_CACHE", raising=False)
    monkeypatch.setenv(name, f"{tmp_path}/\udcff")
    with pytest.raises(UsageError, match="its name is not valid UTF-8") as caught:
        cache.cache_folder("data")
    assert "QLORA_CACHE" in str(caught.value.hint)
    assert "\udcff" not in str(caught.value)


def test_predictions_beyond_the_limit_are_deleted_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(prediction_cache, "MAX_PREDICTIONS", 2)
    folder = tmp_path / "memory"
    folder.mkdir()
    for name in ("mine.json", "also.json", "notes.txt"):
        (folder / name).write_text("mine")
    for number in range(4):
        prediction_cache.store(f"{number}" * 64, REPORT)
    names = {path.name for path in folder.iterdir()}
    assert {"mine.json", "also.json", "notes.txt"} < names
    assert len(names) == 3 + 2
    assert prediction_cache.load("3" * 64) == REPORT


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_a_cached_prediction_that_is_not_our_file_is_recomputed_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    prediction_cache.store("0" * 64, REPORT)
    file = tmp_path / "memory" / f"{'0' * 64}.json"
    file.rename(tmp_path / "elsewhere")
    if kind == "a link":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    assert prediction_cache.load("0" * 64) is None


# Code that transfers bytes and words messages: no cached result depends on it.
CARRIERS = {"alongside", "bounded", "cache", "errors", "events", "files", "garbage", "hub", "runs", "units", "writing"}


def imported_by(module: str) -> set[Path]:
    """Return the files of the package that a module imports, directly or indirectly, anywhere in the code."""
    imported: set[Path] = set()
    waiting = [place_of(module)]
    while waiting:
        path = waiting.pop()
        if path is None or path in imported:
            continue
        imported.add(path)
        waiting += [place_of(name) for name, _, _ in imports_of(path) if name.startswith("qlora_cli.")]
    return imported


def place_of(module: str) -> Path | None:
    place = cache.PACKAGE.joinpath(*module.split(".")[1:])  # of a module, or of a name in one
    files = (place.with_suffix(".py"), place / "__init__.py", place.parent.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("qlora_cli.memory.estimator", prediction_cache.PARTS),
        ("qlora_cli.data.tokenizing.encode", encode.CODE_PARTS),
    ],
    ids=["predictions", "tokens"],
)
def test_everything_that_determines_a_cached_result_is_in_its_name(module: str, parts: tuple[str, ...]) -> None:
    """Moving code must not remove it from the keys, or results of the old code would be taken for new ones."""
    named = {file for part in parts for file in cache.code_files(part)}
    carriers = {path for path in cache.PACKAGE.rglob("*.py") if part_of_path(path) in CARRIERS}
    imported = imported_by(module)
    assert len(imported) > 50
    assert imported - named - carriers == set()


def part_of_path(path: Path) -> str:
    return path.relative_to(cache.PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("parts", [prediction_cache.PARTS, encode.CODE_PARTS])
def test_every_named_part_exists(parts: tuple[str, ...]) -> None:
    for part in parts:
        assert cache.code_files(part), part
