"""The sources of settings: a YAML file, `--set section.key=value`, flags.

Each source yields `SettingEntry` values with their origin, and the problems found. Only the structure is checked here;
`resolve` validates the values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from qlora_cli.errors import Problem, SettingsError
from qlora_cli.settings.files.yaml_limits import MAX_BYTES, UNREADABLE, find_violation
from qlora_cli.settings.foreign_names import foreign_of
from qlora_cli.settings.models import KINDS, SECTIONS, metadata_of
from qlora_cli.settings.setting_metadata import Command
from qlora_cli.units import format_bytes

# `code`: created in code, without a command line. `inferred`: not asked for, but read from a file or the machine.
# `provisional`: the user left it open, and what is inferred takes its place.
Kind = Literal["default", "file", "set", "flag", "code", "inferred", "provisional"]
MOST_FOREIGN = 3  # foreign keys in a file that are explained one by one; with more, it is the file of another tool
GIVEN: frozenset[Kind] = frozenset({"file", "set", "flag", "code"})


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value came from: `run.yaml:12`, `--set lora.rank`, `--rank` or `default`."""

    kind: Kind
    where: str

    @property
    def is_given(self) -> bool:
        """Whether the user or the calling code asked for the value."""
        return self.kind in GIVEN

    def locate(self, path: str) -> str:
        """Return where the setting `section.key` was given; for a file, with the setting's name."""
        return f"{self.where} {path}" if self.kind == "file" else self.where


@dataclass(frozen=True, kw_only=True)
class SettingEntry:
    """A value for a setting, from one source."""

    section: str
    key: str
    value: Any
    origin: Origin

    @property
    def path(self) -> str:
        """The setting's full name, `section.key`."""
        return f"{self.section}.{self.key}"


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """Return a hint with the closest match among `known`; None if nothing is close."""
    matches = get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"Did you mean {matches[0]}?" if matches else None


def check_name(section: str, key: str | None, where: str) -> Problem | None:
    """Return the problem with a setting's name; None if the setting exists."""
    if section not in SECTIONS:
        owner = [name for name, model in SECTIONS.items() if section in model.model_fields]
        hint = hint_for_foreign_key(section) or (f"Did you mean {owner[0]}.{section}?" if owner else None)
        hint = hint or did_you_mean(section, list(SECTIONS))
        hint = hint or f"The sections are {', '.join(SECTIONS)}."
        return Problem(where=where, message=f"unknown section {section!r}", hint=hint)
    if key is not None and key not in SECTIONS[section].model_fields:
        known = list(SECTIONS[section].model_fields)
        owner = [name for name, model in SECTIONS.items() if key in model.model_fields]
        hint = SECTIONS[section].removed.get(key)
        hint = hint or (f"Did you mean {owner[0]}.{key}?" if owner else hint_for_foreign_key(key))
        hint = hint or did_you_mean(key, known)
        hint = hint or f"{section} has {', '.join(known)}."
        return Problem(where=where, message=f"unknown setting '{section}.{key}'", hint=hint)
    return None


def hint_for_foreign_key(key: str) -> str | None:
    """Return what the key of another tool is in a settings file of ours; None if it is none that is known."""
    entry = foreign_of(key)
    return None if entry is None else entry.advice or f"It is {entry.setting} here."


def hint_for_foreign_flag(command: str, flag: str) -> str | None:
    """Return what the flag of another tool is here; None if none has it, or it means nothing to `command`."""
    entry = foreign_of(flag)
    if entry is None or command not in list(Command) or not _concerns(entry.setting, Command(command)):
        return None
    if entry.advice or entry.setting is None:
        return entry.advice
    return f"It is {metadata_of(entry.setting).flag or f'--set {entry.setting}=VALUE'} here."


def _concerns(setting: str | None, command: Command) -> bool:
    """Return whether a command takes a setting, by a flag or only in a file; or trains or predicts, if it is none."""
    has_flag = setting is not None and metadata_of(setting).flag is not None
    if setting is not None and has_flag:
        return metadata_of(setting).is_taken_by(command)
    return (setting or "training.seed").partition(".")[0] in KINDS[command].model_fields


def hint_for_removed_flag(command: str, flag: str) -> str | None:
    """Return the hint for a flag of `command` whose setting was removed; None if there was no such flag."""
    section = SECTIONS.get(command.replace("-", "_"))
    return None if section is None else section.removed.get(flag.lstrip("-").replace("-", "_"))


def read_flags(flags: Mapping[str, tuple[str, Any]]) -> list[SettingEntry]:
    """Return the entries of flags: a mapping from `section.key` to the flag's name and value."""
    entries = []
    for path, (flag, value) in flags.items():
        section, key = path.split(".")
        entries.append(SettingEntry(section=section, key=key, value=value, origin=Origin(kind="flag", where=flag)))
    return entries


def read_assignments(assignments: Sequence[str]) -> tuple[list[SettingEntry], list[Problem]]:
    """Read `--set section.key=value`; the value is YAML, so lists and null can be given."""
    entries: list[SettingEntry] = []
    problems: list[Problem] = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        section, dot, key = path.strip().partition(".")
        where = f"--set {path.strip()}"
        if not equals or not dot or not key:
            problems.append(
                Problem(
                    where=f"--set {assignment}",
                    message="expected section.key=value",
                    hint=hint_for_foreign_key(path.strip()) or "For example: --set training.warmup_ratio=0.1",
                )
            )
            continue
        if problem := check_name(section, key, where):
            problems.append(problem)
            continue
        try:
            value = text if find_violation(text) else yaml.safe_load(text)
        except UNREADABLE:
            value = text
        entries.append(SettingEntry(section=section, key=key, value=value, origin=Origin(kind="set", where=where)))
    return entries, problems


def read_file(path: Path) -> tuple[list[SettingEntry], list[Problem]]:
    """Read a settings file: YAML, a mapping of sections to mappings of settings.

    Raises:
        SettingsError: it can't be read at all, or is the file of another tool.
    """
    root = read_yaml(path)
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        raise _file_error(path, "must be a mapping of sections", hint=f"Sections: {', '.join(SECTIONS)}.")
    if foreign := _keys_of_another_tool(root):
        message = f"has the keys of another tool ({', '.join(foreign[:MOST_FOREIGN])}, …)"
        raise _file_error(path, message, hint=f"Turn it into ours: qlora migrate {path} > qlora.yaml")
    return _read_sections(path, root)


def read_yaml(path: Path) -> yaml.Node | None:
    """Return the root of a YAML file within our limits; None if it is empty.

    Raises:
        SettingsError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _file_error(path, f"is larger than {format_bytes(MAX_BYTES)}: no settings file")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise _file_error(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise _file_error(path, f"is not UTF-8 text (byte {error.start})") from error
    if violation := find_violation(text):
        raise SettingsError(
            [Problem(where=f"{path}:{violation.line}", message=violation.message, hint=violation.hint)]
        )
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise SettingsError([Problem(where=f"{path}{line}", message=f"is not valid YAML: {reason}")]) from error
    return root


def _file_error(path: Path, message: str, hint: str | None = None) -> SettingsError:
    return SettingsError([Problem(where=f"--config {path}", message=message, hint=hint)])


def _read_sections(path: Path, root: yaml.MappingNode) -> tuple[list[SettingEntry], list[Problem]]:
    entries: list[SettingEntry] = []
    problems: list[Problem] = []
    for section, line, node in _items(path, root, problems):
        if problem := check_name(section, None, f"{path}:{line}"):
            problems.append(problem)
        elif isinstance(node, yaml.MappingNode):
            for key, key_line, value_node in _items(path, node, problems):
                where = f"{path}:{key_line}"
                if problem := check_name(section, key, where):
                    problems.append(problem)
                    continue
                try:
                    value = _construct(value_node)
                except UNREADABLE as error:
                    has_reason = isinstance(error, yaml.YAMLError | ValueError)
                    reason = (getattr(error, "problem", None) or error) if has_reason else "it does not match its tag"
                    problems.append(Problem(where=f"{where} {section}.{key}", message=f"can't be read: {reason}"))
                    continue
                origin = Origin(kind="file", where=where)
                entries.append(SettingEntry(section=section, key=key, value=value, origin=origin))
        elif node.tag != "tag:yaml.org,2002:null":  # an empty section is fine
            message = f"section {section!r} must be a mapping of settings"
            problems.append(Problem(where=f"{path}:{line}", message=message))
    return entries, problems


def _keys_of_another_tool(root: yaml.MappingNode) -> list[str]:
    """Return the foreign keys of a file that has several of them and no section of ours; empty for any other."""
    keys = [str(key.value) for key, _ in root.value]
    foreign = [key for key in keys if foreign_of(key) is not None]
    return foreign if len(foreign) >= MOST_FOREIGN and not set(keys) & set(SECTIONS) else []


def _items(path: Path, node: yaml.MappingNode, problems: list[Problem]) -> Iterator[tuple[str, int, yaml.Node]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            message = f"{key!r} is given twice, first on line {seen[key]}"
            problems.append(Problem(where=f"{path}:{line}", message=message))
        seen.setdefault(key, line)
        yield key, line, value_node


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
