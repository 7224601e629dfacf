"""The documentation: its commands parse with valid values, what it names exists, and the generated page is fresh."""

import importlib
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from qlora_cli.answering.answers import Answer, GenerationReport, PromptAnswers
from qlora_cli.cli import options
from qlora_cli.cli.app import app
from qlora_cli.data.feeding.data_report import DataReport
from qlora_cli.data.showing.inspection import Bar, BatchSummary, DataInspection, Trouble
from qlora_cli.data.showing.preview import RowPreview, TokenPiece
from qlora_cli.demo.demo_result import DemoResult
from qlora_cli.evaluating.comparison_result import ComparedRun, DifferingSetting, RunComparison
from qlora_cli.evaluating.evaluation_result import Evaluation, SourceResult, TaskResult
from qlora_cli.events import EvalDone, Noted, StepSkipped
from qlora_cli.memory.prediction import (
    COMPONENTS,
    PHASES,
    CardClass,
    Components,
    Figures,
    GpuFit,
    MemoryReport,
    MethodOption,
    Phase,
    PlanOption,
    Solution,
    Suggestion,
    SweepPoint,
)
from qlora_cli.memory.report_parts import FittingModel, SpareMemory
from qlora_cli.merging.merge_result import (
    ActionCount,
    AppliedAdapter,
    BaseChoice,
    Divergence,
    MergeReport,
    MergeResult,
    ModuleCheck,
    Rounding,
    TensorPlan,
    Verification,
)
from qlora_cli.quantization.load_report import LoadReport
from qlora_cli.runs.adapter_health import AdapterHealth, ModuleHealth
from qlora_cli.runs.detail import RunDetail
from qlora_cli.runs.metrics import EVENT_NAMES
from qlora_cli.runs.run_result import PeakMemory, PredictedMemory, PredictedTime, TrainPlan, TrainResult
from qlora_cli.runs.samples import Sample, SampleAnswer
from qlora_cli.runs.summary import RunSummary
from qlora_cli.settings.models import SECTIONS, TrainSettings, all_settings, metadata_of
from qlora_cli.settings.resolve import describe
from qlora_cli.tuning.tuning_result import TrialResult, TunePlan, TuneResult
from tests.support.source.documented_code import ROOT, code_lines

ABOUT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")]
PAGES = [*ABOUT, *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference"


COMMANDS = sorted({line.split(" > ")[0] for page in PAGES for line in code_lines(page) if line.startswith("qlora ")})
SHOWN_FILE = re.compile(r"^```yaml\n# ([\w.-]+\.yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]


def parse(command: Any, arguments: list[str], parent: Any = None) -> Any:
    """Parse `arguments` down to the last subcommand, running nothing; a wrong flag raises."""
    context = command.make_context(command.name, list(arguments), parent=parent)
    if below := [*getattr(context, "_protected_args", ()), *context.args] if hasattr(command, "commands") else []:
        _, subcommand, rest = command.resolve_command(context, below)
        return parse(subcommand, rest, context)
    return context


def flags_of(command: Any) -> set[str]:
    """Return every flag of a command and of its subcommands."""
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags.union(*(flags_of(below) for below in getattr(command, "commands", {}).values()))


def flags_of_train() -> set[str]:
    """Return every flag of the settings that `qlora train` has, which are documented with the settings."""
    marked = [metadata_of(path) for path in all_settings() if path.split(".")[0] in TrainSettings.model_fields]
    return {flag for mark in marked if mark.flag for flag in (mark.flag, options.off_flag(mark))}


def test_there_are_commands_and_examples_to_check() -> None:
    assert len(COMMANDS) >= 15
    assert len(PYTHON) >= 2


@pytest.fixture(scope="module")
def of_a_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the settings files that pages show, of the clone, and what they say is to be downloaded."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    for page in PAGES:
        for name, text in SHOWN_FILE.findall(page.read_text(encoding="utf-8")):
            (folder / name).write_text(text, encoding="utf-8")
    for file in (ROOT / "configs" / "paper").iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_command_parses_with_valid_values(
    line: str, of_a_reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(of_a_reader)  # settings files are read
    arguments = shlex.split(line, comments=True)[1:]
    context = parse(typer.main.get_command(app), arguments)
    if "assignments" in context.params:
        assert describe(options.read_sources(context))


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=lambda value: getattr(value, "name", ""))
def test_every_python_example_compiles(page: Path, block: str) -> None:
    compile(block, str(page), "exec")


def test_every_flag_and_setting_that_is_named_exists() -> None:
    known = flags_of(typer.main.get_command(app)) | {"--help"}
    settings = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    flags_named = settings_named = 0
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            if code.startswith(("--", "qlora ")):
                named = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code))
                assert named <= known, f"{page}: {code}"
                flags_named += len(named)
            if match := re.fullmatch(rf"(?:--set )?((?:{'|'.join(SECTIONS)})\.(?!json\b)[a-z_]+)(?:=.*)?", code):
                assert match[1] in settings, f"{page}: {code}"
                settings_named += 1
    assert flags_named >= 30
    assert settings_named >= 4


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_local_links_and_paths_lead_somewhere() -> None:
    links = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
            if not target.startswith("http"):
                links += 1
                linked = page.parent / target if target else page
                assert linked.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors_of(linked), f"{page}: {target}#{anchor}"
        for path in re.findall(r"`((?:qlora_cli|configs|tests|scripts|benchmarks|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
    assert links >= 15


def test_no_command_names_a_settings_file_that_a_wheel_does_not_have() -> None:
    of_the_clone = {ROOT / "docs" / "tutorial" / "first-fine-tune.md"}
    pages = {page: re.findall(r"^.*\bqlora .*--config configs/.*$", page.read_text("utf-8"), re.M) for page in PAGES}
    assert {page for page, commands in pages.items() if commands} == of_the_clone


DATA = (DataReport, DataInspection, BatchSummary, Trouble, Bar, RowPreview, TokenPiece)
RUN = (RunDetail, Sample, SampleAnswer, EvalDone, StepSkipped, Noted)
MERGE = (MergeResult, Verification, ModuleCheck, Rounding, Divergence, BaseChoice, AppliedAdapter)
MERGE_PLAN = (MergeReport, ActionCount, TensorPlan)
MEMORY = (
    *(MemoryReport, Figures, Components, Phase, GpuFit, Suggestion, Solution, SweepPoint, CardClass, FittingModel),
    SpareMemory,
    *(PlanOption, MethodOption),
)


@pytest.mark.parametrize(
    "result",
    [
        *(LoadReport, TrainPlan, TrainResult, PeakMemory, PredictedMemory, PredictedTime, DemoResult),
        *(AdapterHealth, ModuleHealth),
    ],
)
def test_every_json_key_is_documented(result: type) -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    assert [field.name for field in fields(result) if f"`{field.name}`" not in page] == []


def test_every_json_key_of_a_prediction_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora inspect-memory")[2].partition("\n## ")[0]
    keys = {field.name for result in MEMORY for field in fields(result)} | {
        *PHASES,
        *(f"{name}_bytes" for name in COMPONENTS),
    }
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_a_merge_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    for heading, results in (("qlora merge\n", MERGE), ("qlora merge --dry-run\n", MERGE_PLAN)):
        section = page.partition(f"## {heading}")[2].partition("\n## ")[0]
        keys = {field.name for result in results for field in fields(result)}
        assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_an_evaluation_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora evaluate\n")[2].partition("\n## ")[0]
    keys = {field.name for result in (Evaluation, SourceResult, TaskResult) for field in fields(result)}
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_a_comparison_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora compare\n")[2].partition("\n## ")[0]
    keys = {field.name for result in (RunComparison, ComparedRun, DifferingSetting) for field in fields(result)}
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_a_search_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora tune\n")[2].partition("\n## ")[0]
    keys = {field.name for result in (TuneResult, TrialResult, TunePlan) for field in fields(result)}
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_answers_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora generate\n")[2].partition("\n## ")[0]
    keys = {field.name for result in (GenerationReport, PromptAnswers, Answer) for field in fields(result)}
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_an_inspection_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora inspect-data")[2].partition("\n## ")[0]
    # The report on the rows to train on is on the same level as the rest.
    keys = {field.name for result in DATA for field in fields(result)} - {"data"}
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


def test_every_json_key_of_runs_is_documented_in_its_section() -> None:
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    of_all, of_one = (
        page.partition(f"## {name}\n")[2].partition("\n## ")[0] for name in ("qlora runs", "qlora runs show")
    )
    assert [field.name for field in fields(RunSummary) if f"`{field.name}`" not in of_all] == []
    keys = {field.name for result in RUN for field in fields(result)} - {"summary"} | {"value", "origin"}
    assert sorted(key for key in keys if f"`{key}`" not in of_one) == []


def test_every_event_of_a_run_and_its_keys_are_documented() -> None:
    page = (REFERENCE / "run-directory.md").read_text(encoding="utf-8")
    for event, name in EVENT_NAMES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert [field.name for field in fields(event) if f"`{field.name}`" not in row] == []


@pytest.fixture
def make_reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return importlib.import_module("make_reference")


def test_generated_pages_are_fresh(make_reference: ModuleType) -> None:
    assert set(make_reference.PAGES) == {"settings.md", "commands.md", "gpus.md", "platforms.md", "driving.md"}
    for name, page in make_reference.PAGES.items():
        assert (REFERENCE / name).read_text(encoding="utf-8") == page(), "run: make reference"


def test_a_program_can_be_driven_by_one_page(make_reference: ModuleType) -> None:
    """It is short enough to be read at once, says of each command what it leaves, and its keys are those of --json."""
    page = (REFERENCE / "driving.md").read_text(encoding="utf-8")
    assert len(page.split()) < 2000
    assert set(make_reference.EFFECTS) == set(re.findall(r"^## qlora (.+)$", page, re.MULTILINE))
    keys_of = (REFERENCE / "json.md").read_text(encoding="utf-8")
    for name, key, words in make_reference.ORDER:
        section = keys_of.partition(f"## qlora {name}\n")[2].partition("\n## ")[0]
        named = {key, *re.findall(r"`([a-z_]+)`", words)} - set(make_reference.EFFECTS)
        assert [key for key in named if f"`{key}`" not in section] == [], name


def test_every_command_and_flag_is_on_the_page_of_the_commands() -> None:
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")

    def check(command: Any, name: str) -> None:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        if not hasattr(command, "commands") or command.invoke_without_command:
            assert f"\n    {name}" in section, name
            flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
            assert [flag for flag in flags if flag.startswith("--") and f"`{flag}`" not in section] == [], name
        for word, below in getattr(command, "commands", {}).items():
            check(below, f"{name} {word}")

    for word, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        check(command, f"qlora {word}")


def test_the_readme_is_short_and_the_index_has_every_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"]
    assert len(pages) > 40
    assert [str(page) for page in pages if f"({page})" not in index] == []
