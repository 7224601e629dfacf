"""A refused value is named as it was given: by its flag, by `--set`, or with file, line and name.

The first half covers the types of all settings, the second what only files, models and machines show to be wrong.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import qlora_cli
from qlora_cli.cli import options
from qlora_cli.cli.app import app
from qlora_cli.errors import SettingsError
from qlora_cli.settings.display import choices_of, flag_of, is_switch
from qlora_cli.settings.models import KINDS, SECTIONS, all_settings, field_of, metadata_of
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.settings.setting_metadata import Command
from tests.conftest import ASSETS, write_jsonl


def takes_words(path: str) -> bool:
    """Return whether a setting takes any text, so that no value has the wrong type."""
    setting = field_of(path)
    kinds = str(setting.annotation)
    return not (choices_of(setting) or is_switch(setting) or "int" in kinds or "float" in kinds)


NARROW = [path for path in all_settings() if not takes_words(path)]


@pytest.mark.parametrize("command", list(Command))
def test_a_value_of_the_wrong_type_is_named_as_it_was_given(command: Command, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    for path in NARROW:
        section, key = path.split(".")
        config.write_text(f"# a file\n{section}:\n  {key}: nonsense\n")
        ways = {
            "--flag": Sources(flags={path: ("--flag", "nonsense")}),
            f"--set {path}": Sources(assignments=[f"{path}=nonsense"]),
            f"{config}:3 {path}": Sources(config=config),
        }
        for where, sources in ways.items():
            with pytest.raises(SettingsError) as caught:
                resolve(sources, KINDS[command])
            assert where in {problem.where for problem in caught.value.problems}, (path, where)


def test_most_settings_do_not_take_any_text() -> None:
    assert len(NARROW) >= 60


# ---- what only files, models and machines show to be wrong


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A value that is refused, what the message says, and the settings given with it."""

    command: Command
    path: str
    value: Any
    says: str
    context: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.command.value}-{self.path}"


def wrong(command: Command, path: str, value: Any, says: str, **context: Any) -> Wrong:
    return Wrong(
        command=command,
        path=path,
        value=value,
        says=says,
        context={name.replace("__", "."): other for name, other in context.items()},
    )


LOAD, TRAIN, MERGE = Command.LOAD, Command.TRAIN, Command.MERGE
MEMORY, DATA = Command.INSPECT_MEMORY, Command.INSPECT_DATA
GENERATE, CHAT, EVALUATE = Command.GENERATE, Command.CHAT, Command.EVALUATE
CASES = [
    *(wrong(command, "model.name", "./no", "no model at ./no") for command in Command if command is not MERGE),
    wrong(MERGE, "merge.adapters", "./no", "no model at ./no"),
    *(
        wrong(command, "model.base_model", "./other", "./other has no effect")
        for command in (LOAD, TRAIN, DATA, GENERATE, CHAT, EVALUATE)
    ),
    wrong(LOAD, "load.save", "FULL", "contains other files"),
    wrong(LOAD, "load.save", "saved", "nothing is quantized", quantization__method="none"),
    wrong(LOAD, "model.offload_embedding", True, "has no effect: the model is on cpu"),
    wrong(LOAD, "quantization.skip_modules", "nope", "'nope' matches no layer"),
    wrong(LOAD, "quantization.int8_cpu_offload", True, "has no effect: the model is on", quantization__method="int8"),
    wrong(LOAD, "quantization.compute_dtype", "bf16", "has no effect with", quantization__method="none"),
    wrong(TRAIN, "data.dataset", "no.jsonl", "no.jsonl"),
    wrong(TRAIN, "data.eval_dataset", "no.jsonl", "no.jsonl"),
    wrong(TRAIN, "data.eval_split", "validation", "it has no splits"),
    wrong(TRAIN, "data.eval_split", "1000000", "can't be held out"),
    wrong(TRAIN, "data.eval_group", "user", "has no column 'user'", data__eval_split="50%"),
    wrong(TRAIN, "data.mixing", "all_exhausted", "has no effect on a single data set"),
    wrong(TRAIN, "data.split", "validation", "has no effect on"),
    wrong(TRAIN, "data.columns", "prompt=zz,completion=text", "has no column 'zz'"),
    wrong(TRAIN, "data.max_length", 100000, "more than the 512 positions"),
    wrong(TRAIN, "lora.modules_to_save", "nope", "'nope' matches no module"),
    wrong(TRAIN, "lora.dropout", 0.1, "can't be applied to fused experts", lora__target_parameters="all-experts"),
    wrong(TRAIN, "training.general_text", "./no", "no can't be read"),
    wrong(TRAIN, "output.directory", "FULL", "contains other files"),
    wrong(TRAIN, "output.resume", "./no", "there is no checkpoint of a run in no"),
    wrong(TRAIN, "output.push_to_hub", "x", "does not say whose repository"),
    wrong(TRAIN, "output.hub_private", False, "has no effect without output.push_to_hub"),
    wrong(DATA, "data.dataset", "no.jsonl", "no.jsonl"),
    wrong(DATA, "inspect_data.html", "FULL", "is a directory"),
    wrong(DATA, "data.max_length", 100000, "more than the 512 positions"),
    wrong(MEMORY, "inspect_memory.gpus", "RTX 9999", "RTX 9999"),
    wrong(MEMORY, "inspect_memory.sweep", "rank=x", "expected values such as"),
    wrong(MEMORY, "inspect_memory.sweep", "rnk=8", "can't be swept"),
    wrong(MEMORY, "inspect_memory.plot", "picture.txt", "unknown kind of picture"),
    wrong(MEMORY, "inspect_memory.solve", "rank", "needs a GPU to fit on"),
    wrong(MEMORY, "inspect_memory.sdpa_backend", "flash", "has no effect with", model__attention="eager"),
    wrong(MERGE, "merge.output", "FULL", "contains other files", merge__adapters="ADAPTER"),
    wrong(MERGE, "merge.weights", 0, "must be a number other than 0", merge__adapters="ADAPTER"),
    wrong(MERGE, "merge.max_divergence", -1, "must be a number of nats", merge__adapters="ADAPTER"),
    wrong(MERGE, "merge.gguf_type", "f16", "has no effect without --format gguf", merge__adapters="ADAPTER"),
    wrong(MERGE, "merge.llama_cpp", "./no", "no does not exist", merge__adapters="ADAPTER", merge__formats="gguf"),
    wrong(MERGE, "merge.push_to_hub", "x", "does not say whose repository", merge__adapters="ADAPTER"),
    wrong(MERGE, "merge.hub_private", False, "has no effect without merge.push_to_hub", merge__adapters="ADAPTER"),
    wrong(GENERATE, "generate.merged", "./no", "no is no directory", generate__compare=True),
    wrong(GENERATE, "generate.compare", True, "there is nothing to compare"),
    wrong(GENERATE, "generate.top_p", 0.5, "has no effect: decoding is greedy"),
    wrong(CHAT, "generate.compare", True, "there is nothing to compare"),
    wrong(EVALUATE, "evaluate.merged", "./no", "there is no directory no"),
    wrong(EVALUATE, "evaluate.task_path", "./no", "there is no directory no"),
    wrong(EVALUATE, "evaluate.limit", 3, "has no effect without --tasks"),
    wrong(EVALUATE, "evaluate.split", "test", "has no effect"),
    wrong(EVALUATE, "evaluate.with_base", True, "has no effect", data__dataset="ROWS"),
    wrong(EVALUATE, "evaluate.batch_size", 0, "must be greater than or equal to 1"),
]
NEEDED = {
    TRAIN: {"data.dataset": "ROWS", "output.directory": "run"},
    DATA: {"data.dataset": "ROWS"},
    GENERATE: {"generate.prompts": "Hello"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, rows, an adapter without a base, and a directory that is not empty."""
    place = tmp_path_factory.mktemp("place")
    write_jsonl(place / "rows.jsonl", [{"prompt": f"{number}?", "completion": f"{number}."} for number in range(8)])
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone", "peft_type": "LORA"}')
    save_file({}, place / "adapter" / "adapter_model.safetensors")
    return place


def in_place(value: Any, place: Path) -> Any:
    """Return a value in which each name that stands for a file is replaced by its path."""
    names = {"ROWS": place / "rows.jsonl", "FULL": place / "full", "ADAPTER": place / "adapter"}
    return str(names[value]) if isinstance(value, str) and value in names else value


def by_flag(case: Wrong, value: Any) -> list[str]:
    if case.command in metadata_of(case.path).argument_of:
        return [str(value)]
    if is_switch(field_of(case.path)):
        return [flag_of(case.path) if value else options.off_flag(metadata_of(case.path))]
    return [flag_of(case.path), str(value)]


def ways_to_give(case: Wrong, value: Any, place: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield how a value is named, with the arguments that give it: by its flag if any, by `--set`, and in a file."""
    marked = metadata_of(case.path)
    if marked.is_taken_by(case.command):
        is_argument = case.command in marked.argument_of
        flag = by_flag(case, value)
        yield options.argument_name(marked) if is_argument else flag[0], flag
    yield f"--set {case.path}", ["--set", f"{case.path}={value}"]
    config = place / "given.yaml"
    section, key = case.path.split(".")
    config.write_text(f"# a file\n{yaml.safe_dump({section: {key: value}})}")
    yield f"{config}:3", ["--config", str(config)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_value_that_is_refused_is_named_as_it_was_given(
    case: Wrong, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value = in_place(case.value, place)
    rest = {"model.device": "cpu", **NEEDED.get(case.command, {}), **case.context}
    if case.command is not MERGE:
        rest["model.name"] = str(ASSETS / "base")
    rest.pop(case.path, None)
    rest_as_flags = [part for path, other in rest.items() for part in ("--set", f"{path}={in_place(other, place)}")]
    for where, arguments in ways_to_give(case, value, place):
        done = CliRunner().invoke(app, [case.command.value, *arguments, *rest_as_flags], input="")
        assert done.exit_code == 2, done.output
        (line,) = [line for line in done.stderr.splitlines() if case.says in line]
        assert line.startswith(f"error: {where}"), line
        assert line.removeprefix(f"error: {where}")[0] in ": "
        assert not where.endswith(":3") or case.path in line
        assert "hint: " in done.stderr


def test_every_command_has_a_case() -> None:
    assert {case.command for case in CASES} == set(Command)


RESULTS_OF_A_RUN = {"resume.py"}  # it names the settings that have changed since the run began


def test_no_error_spells_out_the_flag_or_the_name_of_its_setting() -> None:
    package, spelt, num_errors = Path(qlora_cli.__file__).parent, [], 0
    for file in sorted(package.rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and call.args and ast.unparse(call.func).endswith("Error"):
                num_errors += 1
                message = ast.unparse(call.args[0]).lstrip("f'\"")
                begins = message.startswith(("--", *(f"{section}." for section in SECTIONS)))
                spelt += [f"{file.name}: {message}"] if begins and file.name not in RESULTS_OF_A_RUN else []
    assert spelt == []
    assert num_errors > 200
