"""Every command takes its settings from sections of one file, by --set and by flags, each with its origin."""

from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from qlora_cli.cli import options
from qlora_cli.cli.app import app
from qlora_cli.errors import SettingsError
from qlora_cli.settings.models import (
    KINDS,
    SECTIONS,
    ChatSettings,
    EvaluateSettings,
    GenerateSettings,
    InspectDataSettings,
    InspectMemorySettings,
    LoadCommandSettings,
    MergeCommandSettings,
    Section,
    TrainSettings,
    all_settings,
    field_of,
    metadata_of,
)
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.settings.setting_metadata import Command, field_metadata
from tests.conftest import RunQlora

# A file that any command takes, whatever its own sections are.
FILE = """
model: {name: base}
data: {dataset: rows.jsonl, max_length: 512}
output: {directory: run}
load: {save: quantized, error: true}
inspect_data: {rows: 7}
inspect_memory: {gpus: [RTX 4090, T4], solve: rank, sdpa_backend: math, evaluate: true}
generate: {prompts: [one, two], temperature: 0.5, top_k: 3}
evaluate: {batch_size: 2, tasks: "a,b,a", with_base: false}
merge: {adapters: [run], weights: [0.5], formats: [hf, nf4, hf], dtype: float16}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "all.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_every_command_has_its_settings_and_every_flag_a_command() -> None:
    assert set(KINDS) == set(Command)
    taken = {path for command in Command for path, _ in options.settings_of(command)}
    assert {path for path in all_settings() if metadata_of(path).flag or metadata_of(path).argument_of} == taken


@pytest.mark.parametrize("command", list(Command))
def test_a_command_has_the_flags_of_its_metadata_and_takes_a_file(command: Command) -> None:
    parameters = typer.main.get_command(app).commands[command.value].params  # type: ignore[attr-defined]
    names = {parameter.name for parameter in parameters}
    assert {options.parameter_of(path) for path, _ in options.settings_of(command)} <= names
    assert {"config", "assignments"} <= names
    sections = {name.partition("__")[0] for name in names if "__" in name}
    assert sections <= set(KINDS[command].model_fields)


@pytest.mark.parametrize("command", list(Command))
def test_no_two_settings_of_a_command_share_a_flag(command: Command) -> None:
    flags = [field_metadata(field).flag or metadata_of(path).flag for path, field in options.settings_of(command)]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (LoadCommandSettings, {"load.save": Path("quantized"), "load.error": True}),
        (InspectDataSettings, {"inspect_data.rows": 7}),
        (
            InspectMemorySettings,
            {"inspect_memory.gpus": ("RTX 4090", "T4"), "inspect_memory.solve": ("rank",), "data.max_length": 512},
        ),
        (GenerateSettings, {"generate.prompts": ("one", "two"), "generate.temperature": 0.5, "generate.top_k": 3}),
        (ChatSettings, {"generate.top_k": 3}),
        (EvaluateSettings, {"evaluate.batch_size": 2, "evaluate.tasks": ("a", "b"), "evaluate.with_base": False}),
        (MergeCommandSettings, {"merge.weights": (0.5,), "merge.formats": ("hf", "nf4"), "merge.dtype": "fp16"}),
        (TrainSettings, {"output.directory": Path("run")}),
    ],
)
def test_one_file_serves_every_command_and_says_where_each_value_is(
    kind: type[Section], expected: dict[str, Any], config: Path
) -> None:
    resolved = resolve(Sources(config=config), kind)
    for path, value in expected.items():
        section, key = path.split(".")
        assert getattr(getattr(resolved.settings, section), key) == value
        line = FILE.splitlines().index(next(text for text in FILE.splitlines() if text.startswith(f"{section}:"))) + 1
        assert resolved.where_of(path) == f"{config}:{line} {path}"


@pytest.mark.parametrize(
    ("text", "complains"),
    [
        ("generate: {prompts: [one], top_p: 0.9}", {GenerateSettings}),
        ("data: {dataset: rows.jsonl}\ntraining: {eval_steps: 5}", {TrainSettings}),
        ("lora: {init_lora_weights: pissa}", {TrainSettings}),
    ],
)
def test_rules_between_sections_apply_to_the_commands_that_take_both(
    text: str, complains: set[type[Section]], config: Path
) -> None:
    rest = ["model: {name: base}", "output: {directory: run}", "merge: {adapters: [run]}"]
    rest += [] if "data:" in text else ["data: {dataset: rows.jsonl}"]
    rest += [] if "generate:" in text else ["generate: {prompts: [one]}"]
    config.write_text("\n".join([text, *rest]))
    for kind in (LoadCommandSettings, GenerateSettings, MergeCommandSettings, TrainSettings):
        if kind in complains:
            with pytest.raises(SettingsError, match=r"has no effect|can't be used"):
                resolve(Sources(config=config), kind)
        else:
            assert resolve(Sources(config=config), kind).origins


def test_an_assignment_and_a_flag_override_the_file(config: Path) -> None:
    sources = Sources(
        config=config,
        assignments=["merge.dtype=fp32", "merge.base=original"],
        flags={"merge.base": ("--base", "dequantized")},
    )
    resolved = resolve(sources, MergeCommandSettings)
    merge = resolved.settings.merge
    assert (merge.dtype, merge.base, merge.adapters) == ("fp32", "dequantized", ("run",))
    assert resolved.where_of("merge.dtype") == "--set merge.dtype"
    assert (resolved.where_of("merge.base"), resolved.where_of("merge.output")) == ("--base", "--output")
    assert resolved.where_of("merge.adapters").endswith(" merge.adapters")


def test_adapters_have_equal_weights_if_none_is_given() -> None:
    given = {"merge.adapters": ("RUN_OR_ADAPTER", ["a", "b"])}
    assert resolve(Sources(flags=given), MergeCommandSettings).settings.merge.weights == (1.0, 1.0)


def test_config_show_has_the_settings_of_every_command(run_qlora: RunQlora, config: Path) -> None:
    shown = run_qlora("config", "show", "--config", config, "--json").json
    assert list(shown) == all_settings()
    assert shown["merge.dtype"] == {"value": "fp16", "origin": f"{config}:10"}
    assert shown["generate.seed"] == {"value": None, "origin": "default"}
    assert {path.partition(".")[0] for path in shown} == set(SECTIONS)
    lines = run_qlora("config", "show", "--config", config).stdout.splitlines()
    shown_values = {path: value.split("  ")[0] for path, value in (line.split(maxsplit=1) for line in lines)}
    assert list(shown_values) == all_settings()
    assert (shown_values["merge.weights"], shown_values["merge.formats"], shown_values["inspect_memory.sweep"]) == (
        "0.5",
        "hf, nf4",
        "-",
    )


GIVEN = {Command.MERGE: ["run", "other"], Command.TRAIN: ["--model", "m"], Command.INSPECT_DATA: ["--model", "m"]}


@pytest.mark.parametrize("command", list(Command))
def test_config_show_takes_what_a_command_takes_and_shows_what_it_has_a_use_for(
    run_qlora: RunQlora, config: Path, command: Command
) -> None:
    given = [*GIVEN.get(command, ["m"]), "--config", config, "--set", "data.max_length=64", "--trust-remote-code"]
    shown = run_qlora("config", "show", command.value, *given, "--json").json
    assert {path.split(".")[0] for path in shown} == set(KINDS[command].model_fields)
    assert {path for path, _ in options.settings_of(command)} <= set(shown)
    assert [path for path in shown if metadata_of(path).flag and not metadata_of(path).is_taken_by(command)] == []
    assert shown["model.trust_remote_code"] == {"value": True, "origin": "--trust-remote-code"}
    assert shown.get("data.max_length", {"value": 64})["value"] == 64


def test_config_show_shows_the_settings_as_the_command_reads_them(run_qlora: RunQlora, config: Path) -> None:
    merge = run_qlora("config", "show", "merge", "a", "b", "--dtype", "BF16", "--config", config, "--json").json
    assert merge["merge.adapters"] == {"value": ["a", "b"], "origin": "RUN_OR_ADAPTER"}
    assert merge["merge.dtype"] == {"value": "bf16", "origin": "--dtype"}
    assert "model.dtype" not in merge
    evaluate = run_qlora("config", "show", "evaluate", "m", "--json").json
    assert evaluate["data.dataset"] == {"value": None, "origin": "default"}
    wrong = run_qlora("config", "show", "merge", "a", "--dtype", "bf17")
    assert (wrong.code, "--dtype: 'bf17' is not one of keep" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "4", "merge", "a"], "flags of merge come after its name"),
        (["mrge", "a"], "no such command 'mrge'"),
        (["merge", "a", "--dry-run"], "no such option: --dry-run"),
        (["merge", "a", "--rank", "4"], "no such option: --rank"),
    ],
)
def test_config_show_refuses_what_it_cannot_take(run_qlora: RunQlora, arguments: list[str], expected: str) -> None:
    done = run_qlora("config", "show", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert f"error: {expected}" in done.stderr
    assert "hint: " in done.stderr


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("merge", "merge: {gguf_type: f16}", "all.yaml:1: merge.gguf_type has no effect without --format gguf"),
        ("merge", "model: {trust_remote_code: true}", "all.yaml:1 model.trust_remote_code: can't be enabled in a"),
        ("merge", "merge: {trust_remote_code: true}", "hint: Did you mean model.trust_remote_code?"),
        ("merge", "merge: {base_model: base}", "hint: Did you mean model.base_model?"),
        ("merge", "merge: {device: cpu}", "hint: Did you mean model.device?"),
        ("merge", "merge: {allow_pickle: false}", "hint: Did you mean model.allow_pickle?"),
        ("merge", "merge: {hub_private: false}", "merge.hub_private has no effect without merge.push_to_hub"),
        ("merge", "merge: {weights: [a]}", "all.yaml:1 merge.weights: expected a number, got 'a'"),
        (
            "generate",
            "generate: {top_p: 0.5, prompts: a}",
            "all.yaml:1 generate.top_p: has no effect: decoding is greedy",
        ),
        ("generate", "generate: {prompts: ['']}", "all.yaml:1 generate.prompts: is empty"),
        ("evaluate", "evaluate: {limit: 3}", "all.yaml:1 evaluate.limit: has no effect without --tasks"),
        ("evaluate", "evaluate: {batch_sise: 3}", "all.yaml:1: unknown setting 'evaluate.batch_sise'"),
        (
            "inspect-memory",
            "inspect_memory: {sdpa_backend: flsh}",
            "all.yaml:1 inspect_memory.sdpa_backend: 'flsh' is no",
        ),
        ("inspect-memory", "inspect_memory: {recipe: peft}", "all.yaml:1: unknown setting 'inspect_memory.recipe'"),
        ("inspect-memory", "inspect_memory: {solve: rank}", "all.yaml:1 inspect_memory.solve: needs a GPU to fit on"),
        ("load", "merge: {dtype: bf17}", "all.yaml:1 merge.dtype: 'bf17' is not one of keep, bf16, fp16, fp32"),
    ],
)
def test_a_mistake_in_a_section_is_reported_with_file_line_and_name(
    command: str, text: str, expected: str, tmp_path: Path, base_model: Path
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(text)
    done = CliRunner().invoke(app, [command, str(base_model), "--config", str(path)])
    assert done.exit_code == 2, done.output
    assert expected in done.stderr
    assert "hint: " in done.stderr


def test_every_setting_has_one_line_of_help() -> None:
    assert [path for path in all_settings() if not field_of(path).description] == []
