"""The recipe of CONTRIBUTING.md, "Add an export format": a module, a line, a name, and every command knows it.

The package is copied, and a format is added to it whose weights are rounded to steps of 1/64.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.merging.exports.all_formats import FORMATS
from qlora_cli.merging.exports.export_format import Format
from qlora_cli.settings.choices import ExportFormat
from tests.contract.copied_package import PACKAGE, ask_copy
from tests.support.processes.plain_python import PlainPython

MODULE = '''"""Weights in steps of 1/64, for transformers, and a file that says so."""

import shutil

from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted
from qlora_cli.merging.exports.export_format import Format
from qlora_cli.settings.choices import ExportFormat


class StepsFormat(Format):
    name = ExportFormat.STEPS
    share = 1.0
    library = "stepper"

    @property
    def quantized_to(self):
        return "steps of 1/64"

    @property
    def files(self):
        return ("steps.txt", *super().files)

    def check(self, inputs, reporter):
        if self.request.merge.dtype == "fp16":
            raise ModelError("steps are not written in fp16", hint="Use --dtype bf16.")
        reporter.report(Noted(message="steps are coarse"))

    def write(self, export):
        shutil.copytree(export.model, export.target, dirs_exist_ok=True)
        for file in export.target.glob("*.safetensors"):
            tensors = {name: (tensor * 64).round() / 64 for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        (export.target / "steps.txt").write_text("1/64")
        if export.comparer is None:
            return None
        return export.comparer.compare(
            export.comparer.stored(export.model), export.comparer.stored(export.target)
        )
'''
# Three files of the copy: where the format is written, named, and in the table.
EDITS = {
    "settings/choices.py": {'    HF = "hf"\n': '    STEPS = "steps"\n'},
    "merging/exports/all_formats.py": {
        "from qlora_cli.merging.exports.ollama": "from qlora_cli.merging.exports.steps import StepsFormat\n",
        "        Nf4Format,\n": "        StepsFormat,\n",
    },
}
# Run in the copied package: train, merge into the format alone and together with another, use what was merged, and
# print it all as one object.
ASK = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from qlora_cli.cli.app import app
from qlora_cli.merging.output_formats import RequestedFormats
from qlora_cli.settings.models import MergeCommandSettings, MergeSettings

base, rows, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
tuned = str(work / "run")

def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])

def run(*arguments):
    done = call(*arguments)
    assert done.exit_code == 0, (arguments, done.output)
    return done.stdout

on_cpu = ("--device", "cpu")
run("train", "--model", base, "--dataset", rows, "--output", tuned, "--dtype", "fp32", "--max-steps", "2",
    "--max-length", "128", *on_cpu, "--json")
into = ("--base", "original", *on_cpu)
alone = json.loads(run("merge", tuned, "--format", "steps", *into, "--json"))
compared = json.loads(run("generate", tuned, "--compare", "--prompt", "What is a list?", *on_cpu, "--json"))
both = run("merge", tuned, "--format", "hf", "--format", "steps", "--output", work / "both", "--verbose", *into)
refused = call("merge", tuned, "--format", "steps", "--dtype", "fp16", "--output", work / "no", *into)
request = MergeCommandSettings(merge=MergeSettings(adapters=(tuned,), formats=("steps", "hf")))
place, patterns = RequestedFormats.of(request).pushed(work / "both")
print(json.dumps({
    "alone": alone,
    "record": json.loads((Path(alone["output"]) / "merge.json").read_text()),
    "card": (Path(alone["output"]) / "README.md").read_text(),
    "with_another": json.loads((work / "both" / "hf" / "merge.json").read_text())["requantized"],
    "compared": compared["merged"],
    "shown": " ".join(both.split()),
    "refused": [refused.exit_code, refused.output],
    "plan": run("merge", tuned, "--format", "steps", "--output", work / "plan", "--dry-run", *into),
    "help": " ".join(run("merge", "--help").split()),
    "pushed": [place.name, sorted(path.name for path in place.iterdir() if any(map(path.match, patterns)))],
    "written": sorted(path.name for path in (work / "both" / "steps").iterdir()),
}))
"""


@pytest.fixture(scope="module")
def asked(plain_python: PlainPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the commands of a copy of the package print, in which three files are new or changed."""
    outcomes: dict[str, Any] = ask_copy(
        plain_python,
        tmp_path_factory.mktemp("copy"),
        edits=EDITS,
        files={"merging/exports/steps.py": MODULE},
        script=ASK,
    )
    return outcomes


def test_it_is_written_compared_with_the_merged_model_and_noted(asked: dict[str, Any]) -> None:
    alone = asked["alone"]
    assert alone["outputs"] == {"steps": alone["output"]}
    (requantized,) = alone["requantized"].values()
    assert requantized["to"] == "steps of 1/64"
    assert alone["verification"]["passed"]
    assert 0 < requantized["divergence"]["mean_kl"] < 10
    assert "steps are coarse" in alone["notes"]


def test_its_record_and_its_card_describe_it_and_those_of_other_formats_do_not(asked: dict[str, Any]) -> None:
    assert asked["record"]["format"] == "steps"
    assert asked["record"]["requantized"] == asked["alone"]["requantized"]["steps"]
    assert asked["with_another"] is None
    assert "library_name: stepper" in asked["card"]
    assert "| requantized | to steps of 1/64: from the merged model, mean KL divergence" in asked["card"]


def test_what_it_refuses_is_refused_before_anything_is_merged(asked: dict[str, Any]) -> None:
    code, output = asked["refused"]
    assert code == 2
    assert "steps are not written in fp16" in output


def test_the_terminal_shows_it(asked: dict[str, Any]) -> None:
    assert re.search(r" steps \S+/both/steps ", asked["shown"])
    assert "Quantized again to steps of 1/64, against the merged model KL divergence" in asked["shown"]
    assert "for steps" in asked["plan"]
    assert re.search(r"--format CHOICE .* One of (\w+, )*steps, ", asked["help"])


def test_its_files_are_pushed_and_as_the_only_format_it_is_the_runs_merged_model(asked: dict[str, Any]) -> None:
    assert asked["pushed"] == ["steps", asked["written"]]
    assert "steps.txt" in asked["written"]
    assert asked["compared"] == asked["alone"]["output"]


# A format by its name in settings, in what is typed, or by the ending of its files.
NAMED = re.compile(
    r"ExportFormat\.([A-Z]\w+)\b|--format (hf|nf4|gguf|ollama)\b|(?<=\")\.?(gguf|ollama|hf)(?=\")|\b(Modelfile)\b"
)
ELSEWHERE = {
    # Their names; the default, and what llama.cpp and its types are for.
    "settings/choices.py": 3,
    "settings/sections/merge.py": 5,
    # Examples in the help of commands.
    "cli/command_examples.py": 3,
    # Whether llama.cpp is here, before torch is imported.
    "merging/merge_checks.py": 3,
    # Weights that are GGUF already, which nothing here reads.
    "model_files/given_model.py": 2,
    "quantization/prequantized.py": 1,
}


def namings(package: Path) -> dict[str, int]:
    """Return how often each file outside `merging/exports/` names a format."""
    counts = {
        path.relative_to(package).as_posix(): len(NAMED.findall(path.read_text(encoding="utf-8")))
        for path in sorted(package.rglob("*.py"))
        if not path.is_relative_to(package / "merging" / "exports")
    }
    return {file: count for file, count in counts.items() if count}


def test_every_format_that_can_be_asked_for_is_in_the_table_with_a_class_of_its_own() -> None:
    assert list(FORMATS) == list(ExportFormat)
    assert len(set(FORMATS.values())) == len(FORMATS)
    assert all(issubclass(kind, Format) for kind in FORMATS.values())


def test_no_format_is_named_elsewhere() -> None:
    assert namings(PACKAGE) == ELSEWHERE


def test_a_name_elsewhere_is_detected(tmp_path: Path) -> None:
    (tmp_path / "merging" / "exports").mkdir(parents=True)
    (tmp_path / "merging" / "exports" / "a.py").write_text("ExportFormat.GGUF\n")
    (tmp_path / "b.py").write_text(
        'if ExportFormat.NF4 in asked or place.name == "hf": hint = "Give --format gguf."\n'
    )
    assert namings(tmp_path) == {"b.py": 3}
