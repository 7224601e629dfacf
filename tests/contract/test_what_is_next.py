"""Commands end with what comes next, as commands that can be typed; --quiet leaves out all but the result."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from qlora_cli.cli.app import app
from tests.conftest import RunQlora
from tests.contract.test_docs import parse

ONE_STEP = ("--max-steps", "1", "--gradient-accumulation-steps", "1", "--device", "cpu")


def commands_in(stderr: str) -> list[str]:
    """Return the commands of the last line, each of which must parse if it is one of ours."""
    last = stderr.splitlines()[-1]
    assert last.startswith("next: ")
    commands = last.removeprefix("next: ").split("; ")
    for command in commands:
        if command.startswith("qlora ") and "same" not in command:
            parse(typer.main.get_command(app), shlex.split(command)[1:])
    return commands


@pytest.fixture(scope="module")
def trained(run_qlora: RunQlora, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("a run")  # with a space, which a shell splits
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = ("train", "--model", base_model, "--dataset", rows, "--output", folder / "run", *ONE_STEP)
    dry = run_qlora(*arguments, "--dry-run")
    done = run_qlora(*arguments)
    quiet = run_qlora(*arguments[:5], "--output", folder / "quiet", *ONE_STEP, "--quiet")
    assert (dry.code, done.code, quiet.code) == (0, 0, 0), dry.stderr + done.stderr + quiet.stderr
    return {"run": folder / "run", "dry": dry, "done": done, "quiet": quiet}


def test_a_run_ends_with_its_page_and_the_commands_that_use_it(trained: dict[str, Any], run_qlora: RunQlora) -> None:
    done, run = trained["done"], trained["run"]
    quoted = shlex.quote(str(run))
    assert commands_in(done.stderr) == [f"qlora {word} {quoted}" for word in ("chat", "evaluate", "merge")]
    page = next(line for line in done.stdout.splitlines() if line.startswith("  report"))
    assert Path(page.removeprefix("  report").strip()).is_file()
    merged = run_qlora("merge", run, "--base", "original")
    assert merged.code == 0, merged.stderr
    assert commands_in(merged.stderr) == [f"vllm serve {shlex.quote(str(run / 'merged'))}"]
    assert len(merged.stdout.splitlines()) == 5


def test_rows_are_shown_by_a_dry_run_only(trained: dict[str, Any]) -> None:
    assert "trained is within « »: " in trained["dry"].stderr
    assert "«" not in trained["done"].stderr
    assert commands_in(trained["dry"].stderr) == ["the same command without --dry-run"]


def test_quiet_leaves_the_result_alone(trained: dict[str, Any]) -> None:
    assert trained["quiet"].stdout.startswith("Trained 1 step\n")
    assert [line for line in trained["quiet"].stderr.splitlines() if not line.startswith("warning: ")] == []


def test_quiet_and_verbose_together_are_refused(run_qlora: RunQlora) -> None:
    done = run_qlora("train", "--quiet", "--verbose")
    assert (done.code, done.stdout) == (2, "")
    assert "both --quiet and --verbose are given" in done.stderr
