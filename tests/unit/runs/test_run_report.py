"""`run_page.html`: its contents, that it is self-contained, and that neither text nor figures break it."""

import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import (
    CheckpointSaved,
    Event,
    Noted,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
)
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.report import run_page
from qlora_cli.runs.report.run_page import report_page, tiles_of, write_report
from qlora_cli.visible import visible
from tests.support.runs.run_directories import HOSTILE, SCRIPT, a_record, eval_done, sample_done, step_done, write_run
from tests.unit.data_rows.test_data_page import Element, parse


def events_of_a_run() -> list[Event]:
    """Return a run with every kind of event, and hostile text wherever text is possible."""
    events: list[Event] = [Noted(message=text) for text in HOSTILE]
    events += [Noted(message=f"lowered {SCRIPT}", level="warning")]
    events += [sample_done(0, prompt, f"before {prompt}") for prompt in HOSTILE]
    for step in range(1, 61):
        loss = {13: float("nan"), 14: float("inf")}.get(step, step_done(step).loss)
        events.append(step_done(step, loss=loss))
        if step % 20 == 0:
            events.append(eval_done(step, 2.0 + abs(step - 40) / 100))
            events += [sample_done(step, prompt, f"{step} {prompt}") for prompt in HOSTILE]
            events.append(CheckpointSaved(step=step, path=Path(f"run/{SCRIPT}")))
    events += [TrainingEnded(step=60, num_steps=100, interrupted_by=f"SIGINT {SCRIPT}")]
    events += [TrainingResumed(step=60, num_steps=100, checkpoint=Path("c")), step_done(61)]
    events += [StepSkipped(step=62, reason=SCRIPT, rows=(SCRIPT, "row \u202e2"))]
    return [*events, TrainingEnded(step=62, num_steps=100, interrupted_by=None)]


def hostile_record() -> dict[str, Any]:
    record = a_record("failed", error=f"Error: {SCRIPT} \u202e\nsecond line")
    record["settings"]["training"]["sample_prompts"] = list(HOSTILE)
    record["settings"][SCRIPT] = {SCRIPT: SCRIPT}
    record["origins"]["training.sample_prompts"] = f"{SCRIPT}.yaml:3"
    for section in ("versions", "hardware", "plan"):
        record[section][SCRIPT] = SCRIPT
    record["data"]["train"]["fingerprint"] = SCRIPT
    record["settings"]["model"]["name"] = f"model {SCRIPT} \ud800"
    return record


def page_of(folder: Path, events: list[Event], record: dict[str, Any] | None) -> str:
    run = read_run(write_run(folder, events, record))
    return report_page(run.summary, run.history, run.record)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("run"), events_of_a_run(), hostile_record())


@pytest.fixture(scope="module")
def root(html: str) -> Element:
    return parse(html)


def style_of(element: Element) -> str:
    return element.attributes.get("style", "")


def words(element: Element) -> str:
    return " ".join(element.text.split())


def test_the_page_begins_with_the_outcome_of_the_run(root: Element) -> None:
    header = root.all("header")[0]
    (state,) = header.all("p", "state")
    assert state.text == "Failed after step 62 of 100"
    assert "failed" in state.kinds
    assert "NVIDIA RTX 4090" in header.text
    assert [error.text for error in header.all("p", "error")] == [f"Error: {SCRIPT} [U+202E]\nsecond line"]
    tiles = [words(tile) for tile in root.all("ul", "tiles")[0].all("li")]
    assert tiles == [
        f"Loss{step_done(61).loss:.4f}at the last step",
        "Best held-out loss2.0000at step 40, 2.2000 at the end",
        "Speed1,031tokens a second over all steps",
        "Peak memory8.00 GiBreserved, 10.00 GiB predicted",
    ]


def test_headings_are_in_order(root: Element) -> None:
    headings = [
        element for element in root.all() if re.fullmatch("h[1-4]", element.tag) and element.tag in {"h1", "h2"}
    ]
    assert [heading.text for heading in headings][1:] == [
        *("Answers before and after", "Notes and warnings", "Peak memory", "Rows and tokens", "Settings", "How it ran")
    ]


def test_charts_have_curves_ticks_units_and_a_description(root: Element) -> None:
    figures = root.all("figure", "chart")
    titles = [words(figure.all("h3")[0]) for figure in figures]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory"]
    for place, figure in enumerate(figures):
        drawings = figure.all("svg")
        sizes = ["drawn medium", "drawn narrow"] if place else ["drawn wide", "drawn medium", "drawn narrow"]
        assert [drawing.attributes["class"] for drawing in drawings] == sizes
        for drawing in drawings:
            assert drawing.attributes["aria-label"]
            assert [element for element in drawing.all("path") if "stroke: var(--first)" in style_of(element)]
            labels = [text.text for text in drawing.all("text")]
            assert "step" in labels
            assert len(labels) >= 6
    loss = figures[0]
    titles = [title.text for title in loss.all("svg")[0].all("title")]
    assert sum("the best" in title for title in titles) == 1
    assert sum("skipped" in title for title in titles) == 1
    assert sum("resumed" in title for title in titles) == 1
    assert sum("checkpoint" in title for title in titles) == 3
    assert "2 steps with a loss that is no finite number" in loss.all("p", "remark")[0].text


def test_answers_before_and_after_training_are_shown_and_hostile_ones_are_text(root: Element) -> None:
    samples = root.all("article", "sample")
    assert len(samples) == len(HOSTILE)
    for prompt, sample in zip(HOSTILE, samples, strict=True):
        texts = [element.text for element in sample.all("p", "text")]
        shown = "\n".join(visible(line, is_end=False) for line in prompt.replace("\r\n", "\n").split("\n"))
        assert texts == [shown, f"before {shown}", f"40 {shown}", f"60 {shown}"]
        whens = ["before training", "after step 40, the best", "after step 60, the last"]
        assert [heading.text for heading in sample.all("h4")] == whens
        assert all(element.attributes["dir"] == "auto" for element in sample.all("p", "text"))


def test_settings_are_listed_with_their_origin_and_given_ones_first(root: Element) -> None:
    changed, default = root.all("table", "settings")
    rows = [[cell.text for cell in row.all() if cell.tag in {"th", "td"}] for row in changed.all("tr")[1:]]
    assert [(name, origin) for name, _, origin in rows] == [
        ("model.name", "--model"),
        ("training.max_grad_norm", "run.yaml:12"),
        ("training.sample_prompts", f"{SCRIPT}.yaml:3"),
    ]
    assert all(row.all("td")[1].text == "default" for row in default.all("tr")[1:])
    assert root.all("summary")[0].text == f"{len(default.all('tr')) - 1} settings at their default"


def test_predicted_memory_is_next_to_measured_and_trained_data_next_to_held_out(root: Element) -> None:
    memory, data = root.all("table", "figures")
    assert [[cell.text for cell in row.all() if cell.tag in {"th", "td"}] for row in memory.all("tr")[1:]] == [
        ["Allocated by tensors", "9.00 GiB", "6.00 GiB", "+50.0 %"],
        ["Reserved by PyTorch", "10.00 GiB", "8.00 GiB", "+25.0 %"],
        ["Process on the GPU", "11.00 GiB", "\N{EN DASH}", ""],
        ["Process on the host", "\N{EN DASH}", "3.00 GiB", ""],
    ]
    assert [cell.text for cell in data.all("td")] == ["1,500", "20", "70,000", "900"]


def test_the_time_of_a_step_is_next_to_its_prediction_if_both_are_known(tmp_path: Path) -> None:
    plan = {"num_steps": 1, "predicted_time": {"step_seconds": 2.2, "rates": "data sheet"}}
    remarks = []
    for name, result in (("both", {"step_seconds": 2.0}), ("one", {})):
        run = read_run(write_run(tmp_path / name, [step_done(1)], a_record(plan=plan, result=result)))
        tiles = {tile.name: tile.remark for tile in tiles_of(run.summary, run.history)}
        remarks.append(tiles["Speed"])
        assert "data sheet" not in report_page(run.summary, run.history, run.record)
    assert remarks == [
        "tokens a second over all steps; a step 2.00 s, 2.20 s predicted",
        "tokens a second over all steps",
    ]


def test_plan_machine_versions_and_notes_are_on_the_page(root: Element) -> None:
    text = words(root.all("main")[0])
    for expected in (
        *("Padding share25.0 %", "Memory64.00 GiB", "CPUs16", "torch2.11.0", f"lowered {SCRIPT}"),
        *(f"Step 62 was skipped: {SCRIPT} ({SCRIPT}, row [U+202E]2)", "Training was resumed after step 60."),
        f"SIGINT {SCRIPT} stopped it after step 60.",
    ):
        assert expected in text


def test_no_script_can_run_and_nothing_is_fetched(root: Element, html: str) -> None:
    assert root.all("script") == []
    assert root.all("img") == []
    assert root.all("link") == []
    assert SCRIPT in root.text
    (policy,) = [meta for meta in root.all("meta") if "http-equiv" in meta.attributes]
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    attributes = [name for element in root.all() for name in element.attributes]
    assert not [name for name in attributes if name.startswith("on") or name in {"src", "srcset"}]
    links = [element.attributes["href"] for element in root.all() if "href" in element.attributes]
    assert all(link.startswith("#") for link in links)  # marks of a chart, drawn once
    for character in ("\u202e", "\0", "\x1b", "\x07", "\u2028", "\ud800"):
        assert character not in html


def test_a_run_that_crashed_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    for name, record in (("failed", a_record("failed", error="E: early")), ("nothing", None)):
        page = parse(page_of(tmp_path / name, [], record))
        assert "before the first step" in page.all("p", "state")[0].text
        assert page.all("figure") == []
        assert "nothing to draw" in page.all("main")[0].text
    assert "there is no run.json" in page.all("main")[0].text


@pytest.mark.parametrize("value", [None, [], {}, "text", 7, True, [1, "a", None], {"a": [1]}, 1e400, -0.5])
@pytest.mark.parametrize("key", ["settings", "origins", "versions", "hardware", "data", "plan", "result", "error"])
def test_every_record_has_a_page_whatever_it_contains(tmp_path: Path, key: str, value: object) -> None:
    for record in (a_record("failed", **{key: value}), a_record("failed", **{key: {"train": value, "x": value}})):
        parse(page_of(tmp_path, [step_done(1)], record))


def test_the_report_is_complete_in_the_run_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    write_run(tmp_path, events_of_a_run(), hostile_record())
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    parse(path.read_text("utf-8"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it holds samples and rows


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, [step_done(1)], a_record())
    path = write_report(tmp_path)
    before = path.read_bytes()

    def fails(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qlora_cli.writing.os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]


def test_the_template_is_part_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
    assert f"runs/report/{run_page.TEMPLATE}" in project["tool"]["setuptools"]["package-data"]["qlora_cli"]
