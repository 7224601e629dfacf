"""`qlora runs` as a user types it: the table, one run in detail, JSON, the page, and what is wrong."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from qlora_cli.cli.rendering.run_table import table_lines
from qlora_cli.events import CheckpointSaved, Event, Noted, StepSkipped, TrainingEnded, TrainingResumed
from qlora_cli.runs.detail import RunDetail
from qlora_cli.runs.ordering import Order
from qlora_cli.runs.summary import RunSummary
from tests.support.processes.light_commands import LightQlora
from tests.support.runs.run_directories import a_record, eval_done, sample_done, step_done, write_run


def qlora(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three runs in `runs`."""
    monkeypatch.chdir(tmp_path)
    events: list[Event] = [Noted(message="lowered", level="warning"), sample_done(0), *map(step_done, range(1, 41))]
    events += [
        eval_done(20, 1.5),
        eval_done(40, 1.25),
        sample_done(40),
        StepSkipped(step=7, reason="nan", rows=("r",)),
    ]
    events += [CheckpointSaved(step=40, path=Path("c")), TrainingResumed(step=40, num_steps=100, checkpoint=Path("c"))]
    ended = TrainingEnded(step=40, num_steps=100, interrupted_by="SIGINT")
    write_run(tmp_path / "runs" / "stopped", [*events, ended], a_record("interrupted"))
    (tmp_path / "runs" / "stopped" / "checkpoints" / "step-40").mkdir(parents=True)
    write_run(tmp_path / "runs" / "tuning" / "broken", [], a_record("failed", error="OutOfMemoryError: \x1b[31mno"))
    write_run(tmp_path / "runs" / "tuning" / "gone", [step_done(1, loss=float("nan"))], None)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_runs_are_listed_with_their_figures() -> None:
    done = qlora()
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["run", "state", "step", "loss", "best", "tok/s", "memory", "rank", "model", "data", "started"]
    figures = {line[0]: line[1:] for line in lines}
    assert figures["stopped"][:7] == ["interrupted", "40/100", "1.2707", "1.2500", "1,020", "8.00", "GiB"]
    assert figures["tuning/broken"][:6] == ["failed", "0/100", "-", "-", "-", "-"]
    assert figures["tuning/gone"][:6] == ["killed", "1/100", "-", "-", "1,001", "8.00"]
    assert figures["stopped"][7:11] == ["-", "Qwen3-0.6B", "train.jsonl,", "more.jsonl"]
    assert qlora("runs").stdout == qlora("list").stdout == qlora("list", "runs").stdout == done.stdout
    assert "\x1b" not in done.stdout


def test_the_rank_of_a_run_is_listed(tmp_path: Path) -> None:
    record = a_record("done")
    record["settings"]["lora"] = {"rank": 64}
    write_run(tmp_path / "run", [step_done(1)], record)
    assert json.loads(qlora(tmp_path, "--json").stdout)["runs"][0]["rank"] == 64
    heading, row = (line.split() for line in qlora(tmp_path).stdout.splitlines())
    assert row[heading.index("rank") + 1] == "64"  # after the memory, which is a figure and its unit


@pytest.mark.parametrize("columns", [80, 100, 140, 200])
def test_a_table_fits_the_window_by_shortening_names_and_leaving_details_out(columns: int) -> None:
    figures = ("1,000/10,000", "1.2345", "1.2345", "12,345", "123.45 GiB", "64", "Llama-3.1-8B", "train.jsonl")
    rows = [
        ("a/very/long/name/of/a/run-" * 3 + str(number), "interrupted", *figures, "2026-01-01 10:00")
        for number in (1, 2)
    ]
    heading, *shown = [line.plain for line in table_lines(rows, columns)]
    assert max(map(len, [heading, *shown])) <= columns
    assert shown[0].split()[0].endswith("1")
    assert heading.split()[:5] == ["run", "state", "step", "loss", "best"]
    assert ("started" in heading, "data" in heading) == (columns >= 140, columns >= 140)
    assert all(rows[place][0] in line.plain for place, line in enumerate(table_lines(rows, None)[1:]))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("order", list(Order))
def test_runs_are_sorted_with_the_best_first_and_unknown_figures_last(order: Order) -> None:
    runs = json.loads(qlora("--sort", order.value, "--json").stdout)["runs"]
    assert sorted(run["name"] for run in runs) == ["broken", "gone", "stopped"]
    keys = {"loss": "loss", "best": "best_loss", "speed": "tokens_per_second", "memory": "peak_reserved_bytes"}
    if order.value in keys:
        figures = [run[keys[order.value]] for run in runs]
        known = [figure for figure in figures if figure is not None]
        assert figures[: len(known)] == sorted(known, reverse=order == Order.SPEED)
    if order == Order.NAME:
        assert [run["name"] for run in runs] == ["stopped", "broken", "gone"]


@pytest.mark.usefixtures("folder")
def test_runs_are_filtered_by_every_word_in_any_case() -> None:
    def names(*words: str) -> set[str]:
        flags = [part for word in words for part in ("--filter", word)]
        return {run["name"] for run in json.loads(qlora(*flags, "--json").stdout)["runs"]}

    assert names("TUNING") == {"broken", "gone"}
    assert names("tuning", "failed") == {"broken"}
    assert names("nothing like it") == set()
    assert len(qlora("--filter", "killed").stdout.splitlines()) == 2


@pytest.mark.usefixtures("folder")
def test_json_of_the_list_is_one_object_with_every_key() -> None:
    listing = json.loads(qlora("--json").stdout)
    assert list(listing) == ["runs"]
    assert {run["name"] for run in listing["runs"]} == {"stopped", "broken", "gone"}
    for run in listing["runs"]:
        assert list(run) == [field.name for field in fields(RunSummary)]
    assert json.loads(qlora("runs/tuning", "--json").stdout)["runs"] != listing["runs"]


def test_a_directory_without_runs_is_no_error(tmp_path: Path) -> None:
    assert qlora(tmp_path).stdout == f"no runs in {tmp_path}\n"
    assert json.loads(qlora(tmp_path, "--json").stdout) == {"runs": []}


def test_one_run_is_shown_in_detail(folder: Path) -> None:
    done = qlora("show", "runs/stopped")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    for expected in (
        *("stopped: interrupted after step 40 of 100", "loss 1.2707 at the last step", "▇", "step 40 1.2500 the best"),
        *("held-out loss 1.2500 at step 40", "8.00 GiB at its peak, 10.00 GiB predicted (+25.0%)"),
        *("checkpoints step-40", "resumed after step 40", "run the same qlora train again: it resumes from step-40"),
        *("model.name Qwen/Qwen3-0.6B --model", "training.max_grad_norm 0.3 run.yaml:12"),
        *("Why? before training: answer 0 after step 40, the best: answer 40", "step 7 was skipped: nan"),
        "warning: lowered",
    ):
        assert expected in shown
    assert "model.dtype" not in shown
    assert not (folder / "runs" / "stopped" / "report.html").exists()


@pytest.mark.usefixtures("folder")
def test_a_run_that_failed_says_why_and_controls_are_not_passed_on() -> None:
    shown = qlora("show", "runs/tuning/broken").stdout
    assert "broken: failed before the first step" in shown
    assert "OutOfMemoryError: [U+001B][31mno" in shown
    assert "it restarts" in shown


@pytest.mark.usefixtures("folder")
def test_json_of_a_run_has_every_key_and_no_nan() -> None:
    expected = [field.name for field in fields(RunSummary)]
    expected += [field.name for field in fields(RunDetail) if field.name != "summary"]
    for name in ("stopped", "tuning/broken", "tuning/gone"):
        done = qlora("show", f"runs/{name}", "--json")
        detail = json.loads(done.stdout, parse_constant=pytest.fail)
        assert sorted(detail) == sorted(expected)
    stopped = json.loads(qlora("show", "runs/stopped", "--json").stdout)
    assert stopped["settings"] == {
        "model.name": {"value": "Qwen/Qwen3-0.6B", "origin": "--model"},
        "training.max_grad_norm": {"value": 0.3, "origin": "run.yaml:12"},
    }
    assert stopped["evaluations"][1] == {
        **{"step": 40, "loss": 1.25, "seconds": 1.0, "is_best": True},
        "rewards": None,
    }
    assert stopped["samples"][0]["answers"][0] == {"step": 0, "when": "before training", "text": "answer 0"}
    assert stopped["skipped_steps"] == [{"step": 7, "reason": "nan", "rows": ["r"]}]
    assert stopped["resumed_from"] == [40]


def test_the_page_is_written_only_where_it_is_asked_for(folder: Path) -> None:
    done = qlora("show", "runs/stopped", "--html", "page.html", "--json")
    assert json.loads(done.stdout)["name"] == "stopped"
    assert done.stderr == "the page is in page.html\n"
    assert (folder / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert qlora("show", "runs/stopped", "--html", "page.html").exit_code == 0
    (folder / "data.jsonl").write_text("{}")
    refused = qlora("show", "runs/stopped", "--html", "data.jsonl")
    assert refused.exit_code == 2
    assert (folder / "data.jsonl").read_text() == "{}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], "there is no directory nothing"),
        (["runs/stopped/run.json"], "there is no directory runs/stopped/run.json"),
        (["x" * 5000], "there is no directory"),
        (["show"], "missing"),
        (["show", "runs/stoped"], "Did you mean runs/stopped?"),
        (["show", "stopped"], "Did you mean runs/stopped?"),
        (["show", "zzz"], "hint: List the runs: qlora runs DIR"),
        (["show", "runs"], "runs is no run directory"),
        (["show", "runs/stopped", "--html", "none/page.html"], "there is no directory"),
        (["show", "runs/stopped", "--html", "."], "is a directory"),
        (["--jsno"], "Did you mean --json?"),
    ],
)
def test_a_mistake_is_reported_with_a_hint(arguments: list[str], expected: str) -> None:
    done = qlora(*arguments)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert "hint:" in done.stderr
    assert done.stdout == ""


def test_a_missing_default_directory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = qlora()
    assert done.exit_code == 2
    assert "there is no directory runs" in done.stderr


@pytest.mark.parametrize("name", ["show", "list"])
def test_a_directory_called_as_a_command_is_named_by_a_path(folder: Path, name: str) -> None:
    write_run(folder / name / "inner", [step_done(1)], None)
    assert "inner" in qlora(f"./{name}").stdout


def test_the_help_names_both_commands() -> None:
    for flag in ("--help", "-h"):
        done = qlora(flag)
        assert done.exit_code == 0
        assert "list" in done.stdout
        assert "show" in done.stdout


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["runs"], []),
        (["show", "runs/stopped"], []),
        (["show", "runs/stopped", "--html", "p.html"], ["matplotlib"]),  # whose page has charts
    ],
)
def test_runs_are_shown_without_torch(light_qlora: LightQlora, arguments: list[str], heavy: list[str]) -> None:
    done = light_qlora("runs", *arguments)
    assert (done.code, done.heavy) == (0, heavy), done.stderr
