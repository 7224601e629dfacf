"""Turn the configuration of axolotl, LLaMA-Factory or TRL into a settings file of ours, and say what is left out.

What a configuration does not give has that tool's default, not ours, where they differ and the result depends on it.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora_cli.errors import Problem, SettingsError
from qlora_cli.settings.files.settings_file import in_one_line, settings_lines
from qlora_cli.settings.files.yaml_limits import UNREADABLE
from qlora_cli.settings.foreign_names import Foreign, foreign_of, spelling_of
from qlora_cli.settings.models import SECTIONS, TrainSettings, metadata_of, value_adapter
from qlora_cli.settings.value_sources import read_yaml

METHOD, DATASET, FORMAT, SPLIT = "quantization.method", "data.dataset", "data.format", "data.split"
OBJECTIVE = "training.objective"
WARMUP_KEYS = frozenset({"warmup_steps", "warmup_ratio", "num_warmup_steps", "warmup"})
NO_COUNTERPART = "qlora has no such setting."
NOT_GIVEN: tuple[object, ...] = (None, "", [], {})
# Keys that are read first, since others replace what they say of the quantization, or are read with some objectives.
FIRST = ("adapter", "stage", "rl", "rlhf_type")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool: the keys by which its configurations are recognised, and its defaults that differ from ours."""

    name: str
    marks: frozenset[str]
    defaults: Mapping[str, object]


# Of transformers' Trainer, which all three use.
TRAINER = {
    "training.epochs": 3,
    "training.micro_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.schedule": "linear",
    "training.warmup_ratio": 0.0,
    "training.max_grad_norm": 1.0,
    "training.seed": 42,
}
TOOLS = (
    Tool(
        name="axolotl",
        marks=frozenset({"base_model", "sequence_len", "datasets", "adapter", "sample_packing", "num_epochs"}),
        defaults={
            "data.max_length": 512,
            "training.gradient_accumulation_steps": 1,
            "training.max_grad_norm": 1.0,
            "training.seed": 42,
        },
    ),
    Tool(
        name="LLaMA-Factory",
        marks=frozenset({"finetuning_type", "stage", "cutoff_len", "template", "lora_target", "quantization_bit"}),
        defaults={**TRAINER, "training.learning_rate": 5e-5, "lora.rank": 8},
    ),
    Tool(
        name="TRL",
        marks=frozenset({"model_name_or_path", "dataset_name", "use_peft", "lora_r"}),
        defaults={**TRAINER, "training.learning_rate": 2e-5, "data.max_length": 1024, "lora.dropout": 0.05},
    ),
)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A key without a counterpart, or whose value has none. `is_needless`: nothing has to be done in place of it."""

    key: str
    reason: str
    is_needless: bool = False


@dataclass(kw_only=True)
class Migration:
    """A configuration in our settings: values by `section.key`, the key that each came from, and what is left out."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, setting: str, value: object, source: str) -> None:
        """Add a value if our setting takes it; otherwise it is left out."""
        try:
            valid = value_adapter(SECTIONS[setting.partition(".")[0]], setting.partition(".")[2]).validate_python(
                value
            )
        except ValidationError as error:
            reason = f"{setting} does not take {value!r}: {error.errors()[0]['msg']}."
            self.left_out.append(LeftOut(key=source, reason=reason))
            return
        self.values[setting] = valid if isinstance(valid, int | float) else value
        self.sources[setting] = source


def migrate(path: Path) -> Migration:
    """Read the configuration of another tool: YAML, JSON, or arguments as in a shell script.

    Raises:
        SettingsError: it can't be read, or has no key that is known.
    """
    given = {key: value for key, value in _read(path).items() if value not in NOT_GIVEN}
    tool = max(TOOLS, key=lambda tool: len(tool.marks & set(map(spelling_of, given))))
    migration = Migration(tool=tool.name)
    for key in sorted(given, key=lambda key: spelling_of(key) not in FIRST):
        _add_key(migration, key, given[key])
    if not migration.values:
        message = "has no key of axolotl, LLaMA-Factory or TRL"
        raise SettingsError([Problem(where=str(path), message=message, hint="Settings: qlora config show.")])
    _add_defaults(migration, tool, set(map(spelling_of, given)))
    return migration


def _read(path: Path) -> dict[str, Any]:
    text_error: SettingsError | None = None
    try:
        root = read_yaml(path)
    except SettingsError as error:
        root, text_error = None, error
    if isinstance(root, yaml.MappingNode):
        try:
            return {str(key.value): _constructed(value) for key, value in root.value}
        except UNREADABLE as error:
            raise SettingsError([Problem(where=str(path), message=f"can't be read: {error}")]) from error
    try:
        arguments = _arguments(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        arguments = {}
    if not arguments:
        message = "is neither a mapping of keys nor a command with arguments"
        raise text_error or SettingsError([Problem(where=str(path), message=message)])
    return arguments


def _constructed(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a command in a shell script: `--name value`, `--name=value`, `--switch`."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    arguments: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            arguments[spelling_of(name)] = value if equals else True if following.startswith("--") else following
    return arguments


def _add_key(migration: Migration, key: str, value: object) -> None:
    entry = foreign_of(key)
    if entry is None:
        setting = _own_setting(spelling_of(key))
        if setting is None:
            migration.left_out.append(LeftOut(key=key, reason=NO_COUNTERPART))
        else:
            _add_own(migration, setting, key, value)
        return
    if entry.read_with and migration.values.get(OBJECTIVE) not in entry.read_with:
        reason = f"Without {' or '.join(entry.read_with)}, it has no effect."
        migration.left_out.append(LeftOut(key=key, reason=reason, is_needless=True))
    elif entry.setting in (DATASET, "data.eval_dataset"):
        _add_datasets(migration, entry.setting, key, value)
    elif not (value is False and entry.setting is None):
        _add_translated(migration, entry, key, value)


def _own_setting(key: str) -> str | None:
    """Return the setting of `train` with the same name."""
    for section in TrainSettings.model_fields:
        if key in SECTIONS[section].model_fields:
            return f"{section}.{key}"
    return None


def _add_own(migration: Migration, setting: str, key: str, value: object) -> None:
    if setting == DATASET:
        _add_datasets(migration, setting, key, value)
    elif metadata_of(setting).is_forbidden_in_files:
        migration.left_out.append(LeftOut(key=key, reason=f"Give {metadata_of(setting).flag} on the command line."))
    else:
        only = value[0] if setting == "output.report_to" and isinstance(value, list) else value
        migration.add(setting, only, key)


def _add_translated(migration: Migration, entry: Foreign, key: str, value: object) -> None:
    text = str(value).lower()
    if text in entry.values:
        if entry.setting is not None and entry.values[text] is not None:
            migration.add(entry.setting, entry.values[text], key)
    elif entry.is_complete or entry.setting is None:
        reason = entry.advice or f"{entry.setting} has nothing like {text}."
        migration.left_out.append(LeftOut(key=key, reason=reason, is_needless=entry.is_needless))
    else:
        migration.add(entry.setting, value, key)


def _add_datasets(migration: Migration, setting: str, key: str, value: object) -> None:
    if migration.tool == "LLaMA-Factory" and isinstance(value, str):
        reason = f"{value} is a name in dataset_info.json: give the files or hub ids themselves."
        migration.left_out.append(LeftOut(key=key, reason=reason))
        return
    entries = value if isinstance(value, list) else [value]
    if names := list(_dataset_names(migration, key, entries)):
        migration.add(setting, names, key)
    if setting == DATASET:
        _add_common(migration, FORMAT, "type", key, entries)
        _add_common(migration, SPLIT, "split", key, entries)


def _dataset_names(migration: Migration, key: str, entries: Sequence[object]) -> Iterator[str]:
    known = {"path", "name", "type", "split", "ds_type", "data_files", "revision"}
    for entry in entries:
        if not isinstance(entry, Mapping):
            yield str(entry)
            continue
        files = entry.get("data_files")
        revision = f"@{entry['revision']}" if entry.get("revision") else ""
        config = f":{entry['name']}" if entry.get("name") else ""
        yield from map(str, files if isinstance(files, list) else [files or f"{entry.get('path')}{revision}{config}"])
        for unknown in sorted(set(entry) - known):
            reason = "Columns and roles are found by their usual names; --columns names others."
            migration.left_out.append(LeftOut(key=f"{key}.{unknown}", reason=reason))


def _add_common(migration: Migration, setting: str, inner: str, key: str, entries: Sequence[object]) -> None:
    """Add what all data sets have in common; what differs between them is left out."""
    values = [entry.get(inner) for entry in entries if isinstance(entry, Mapping)]
    if not any(values):
        return
    if any(value != values[0] for value in values) or not isinstance(values[0], str):
        reason = f"{setting} is one for all data sets, and a name: {', '.join(map(str, values))}."
        migration.left_out.append(LeftOut(key=f"{key}.{inner}", reason=reason))
    else:
        migration.add(setting, values[0], f"{key}.{inner}")


def _add_defaults(migration: Migration, tool: Tool, given: set[str]) -> None:
    """Add the tool's defaults where it has others than we have."""
    of_tool = f"the default of {tool.name}"
    for setting, value in tool.defaults.items():
        is_left = setting not in migration.values
        if is_left and not (setting == "training.warmup_ratio" and given & WARMUP_KEYS):
            migration.add(setting, value, of_tool)
    if tool.name == "LLaMA-Factory" and "lora.alpha" not in migration.values:
        migration.add("lora.alpha", 2 * migration.values["lora.rank"], f"{of_tool}: twice the rank")
    if METHOD not in migration.values:
        migration.add(METHOD, "none", "not quantized there; nf4 takes a quarter of the memory")


def as_yaml(migration: Migration, source: Path) -> str:
    """Return a settings file, in which each value says where it comes from."""
    lines = [f"# From {in_one_line(source.name)}, a configuration of {migration.tool}, by qlora migrate."]
    missed = [entry for entry in migration.left_out if not entry.is_needless]
    lines += [f"# Left out: {in_one_line(entry.key)}: {in_one_line(entry.reason)}" for entry in missed]
    return "\n".join([*lines, *settings_lines(migration.values, migration.sources)]) + "\n"
