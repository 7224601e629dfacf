"""Commands end with what comes next, as commands that can be typed; --quiet leaves out all but the result."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main

from qlora_cli.cli.app import app
from qlora_cli.cli.rendering.next_steps import after_show
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.summary import State
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
    return {"run": folder / "run", "dry": dry, "done": done, "quiet": quiet, "quiet_run": folder / "quiet"}


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


def test_a_model_that_was_saved_is_the_one_to_go_on_with(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path
) -> None:
    for flags, model in (((), base_model), (("--save", tmp_path / "stored"), tmp_path / "stored")):
        done = run_qlora("load", base_model, *flags)
        assert done.code == 0, done.stderr
        assert commands_in(done.stderr) == [f"qlora inspect-memory {shlex.quote(str(model))}"]


def test_rows_are_shown_by_a_dry_run_only(trained: dict[str, Any]) -> None:
    assert "trained is within « »: " in trained["dry"].stderr
    assert "«" not in trained["done"].stderr
    assert commands_in(trained["dry"].stderr) == ["the same command without --dry-run"]


def test_quiet_leaves_the_result_alone(trained: dict[str, Any]) -> None:
    assert trained["quiet"].stdout.startswith("Trained 1 step\n")
    assert [line for line in trained["quiet"].stderr.splitlines() if not line.startswith("warning: ")] == []


def test_every_command_about_runs_and_models_says_what_is_next(trained: dict[str, Any], run_qlora: RunQlora) -> None:
    run = trained["run"]
    quoted = shlex.quote(str(run))
    answering = ("--device", "cpu", "--max-new-tokens", "1")
    expected = {
        ("generate", run, "--prompt", "hello", *answering): [f"qlora chat {quoted}"],
        ("chat", run, *answering): [f"qlora evaluate {quoted}", f"qlora merge {quoted}"],
        ("runs", run.parent): [f"qlora runs show {shlex.quote(str(trained['quiet_run']))}"],
        ("runs", run.parent, "--sort", "name"): [f"qlora runs show {shlex.quote(str(trained['quiet_run']))}"],
        ("runs", "show", run): [f"qlora {word} {quoted}" for word in ("chat", "evaluate", "merge")],
        ("config", "show", "merge"): ["qlora merge with the same flags"],
        ("config", "show", "--rank", "8"): ["qlora train with the same flags"],
        ("presets",): ["qlora train --preset NAME --dataset FILE --output DIRECTORY"],
        ("presets", "qwen3-8b-24gb"): [
            "save and edit it, then qlora train --config FILE --dataset DATA --output DIRECTORY"
        ],
    }
    for arguments, steps in expected.items():
        done = run_qlora(*arguments)
        assert (done.code, commands_in(done.stderr)) == (0, steps), (arguments, done.stderr)
        assert done.stderr.count("next: ") == 1
        quiet = run_qlora(*arguments, "--quiet")
        assert (quiet.code, quiet.stderr) == (0, ""), arguments
        assert quiet.stdout == done.stdout


def test_without_runs_the_next_one_is_trained(run_qlora: RunQlora, tmp_path: Path) -> None:
    done = run_qlora("runs", tmp_path)
    assert commands_in(done.stderr) == ["qlora train --model MODEL --dataset FILE --output DIRECTORY"]


@pytest.mark.parametrize("state", get_args(State))
def test_a_run_has_a_next_step_in_every_state(trained: dict[str, Any], state: State) -> None:
    steps = after_show(replace(read_run(trained["run"]).summary, state=state))
    resumes = steps == ["the same qlora train command, which goes on where the run ended"]
    assert resumes == (state in ("interrupted", "failed", "killed"))
    assert steps


def test_quiet_and_verbose_together_are_refused(run_qlora: RunQlora) -> None:
    done = run_qlora("train", "--quiet", "--verbose")
    assert (done.code, done.stdout) == (2, "")
    assert "both --quiet and --verbose are given" in done.stderr
