"""`scripts/walk_pages.py` finds the commands of the pages, and gives a reader what they name but do not write."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.source.documented_code import ROOT, Block, blocks_of, statements


@pytest.fixture(scope="module")
def walk_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walk_pages", ROOT / "scripts" / "walk_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_blocks_keep_language_line_and_text(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n1. One:\n\n   ```bash\n   a\n     b\n   ```\n\n    c\n    d\ne\n", encoding="utf-8")
    assert blocks_of(page) == [Block("bash", "a\n  b\n", 6), Block("", "c\nd\n", 10)]


def test_a_statement_of_several_lines_is_one() -> None:
    text = "# comment\na \\\n  --b\n\nif c; then\n  d\nfi\ne 'f\ng'\n"
    assert list(statements(text)) == ["a \\\n  --b\n", "if c; then\n  d\nfi\n", "e 'f\ng'\n"]


def test_a_command_runs_with_what_a_reader_has_or_is_skipped_with_a_reason(walk_pages: ModuleType) -> None:
    train = walk_pages.step_of(1, "qlora train --model meta-llama/Llama-3.1-8B --dataset a.jsonl --output runs/a")
    assert train.command == "qlora train --max-steps 4 --model base --dataset a.jsonl --output runs/a"
    evaluate = walk_pages.step_of(2, "qlora evaluate runs/demo")
    names = walk_pages.names_given([train.command, evaluate.command])
    assert set(names) == {"base", "train.jsonl", "a.jsonl", "runs/demo"}
    assert walk_pages.step_of(3, "docker run qlora doctor").reason == "another program"
    shown = Block("text", "$ qlora train --quant nf5\nerror: no\n", 4)
    (step,) = walk_pages.steps_of(shown)
    assert (step.code, step.output) == (2, "error: no\n")


def test_every_entry_of_its_tables_is_of_use_for_a_page(walk_pages: ModuleType) -> None:
    """Else a page has changed, and what it says now may be run, replaced or given by nothing."""
    steps = [step for page in walk_pages.PAGES for block in blocks_of(page) for step in walk_pages.steps_of(block)]
    assert len(steps) > 150
    written = "\n".join(step.written for step in steps)
    for pattern in (*walk_pages.SKIPPED, *walk_pages.REPLACED, *walk_pages.EXIT_CODES):
        assert re.search(pattern, written, re.MULTILINE), pattern
    run = [step.command for step in steps if step.reason is None]
    given = [*walk_pages.names_given(run), *walk_pages.names_given([run_ for run_ in run if "--output" not in run_])]
    for pattern in walk_pages.MAKERS:
        assert any(re.fullmatch(walk_pages.name_of(pattern), name) for name in given), pattern


def test_a_page_names_a_directory_for_one_run(walk_pages: ModuleType) -> None:
    """Else the second command would resume the first one's run, or be refused by it; a page on resuming does that."""
    num_runs = 0
    for page in walk_pages.PAGES:
        commands: dict[str, str] = {}
        steps = [step for block in blocks_of(page) for step in walk_pages.steps_of(block) if step.code == 0]
        for step in steps if page.name != "long-runs.md" else []:
            if (
                output := re.search(r"qlora train .*--output (\S+)", step.written)
            ) and "--dry-run" not in step.written:
                assert commands.setdefault(output[1], step.written) == step.written, f"{page}:{step.line}"
        num_runs += len(commands)
    assert num_runs > 20


def test_a_difference_from_what_a_page_shows_is_a_failure(walk_pages: ModuleType, tmp_path: Path) -> None:
    echo = walk_pages.Step(line=1, written="echo a", command="echo a", output="a\n")
    assert walk_pages.walk_step(echo, tmp_path)[0] == "ran"
    for changed in ({"output": "b\n"}, {"code": 2}):
        step = walk_pages.Step(**{**vars(echo), **changed})
        end, detail = walk_pages.walk_step(step, tmp_path)
        assert end == "failed"
        assert detail.endswith("a\n")
