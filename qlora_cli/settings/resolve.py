"""Merge the sources, validate once, and record the origin of every value.

Precedence: flag > `--set` > file > default. All problems are collected, so that a user sees them at once. Nothing here
imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_cli.errors import Problem, QloraError, SettingsError
from qlora_cli.settings.display import choices_of, example_of, flag_of, hint_for
from qlora_cli.settings.models import SECTIONS, Section, field_of, sections_of, value_adapter
from qlora_cli.settings.objectives import DataFormat, Objective
from qlora_cli.settings.rules.conflicts import find_conflicts, forbidden_in_files
from qlora_cli.settings.rules.objective_rules import implied_values
from qlora_cli.settings.value_sources import (
    Origin,
    SettingEntry,
    did_you_mean,
    read_assignments,
    read_file,
    read_flags,
)
from qlora_cli.settings.values import CUSTOM_ERROR

SettingsT = TypeVar("SettingsT", bound=Section)
SettingsT_co = TypeVar("SettingsT_co", bound=Section, covariant=True)
DEFAULT = Origin(kind="default", where="default")
OBJECTIVE = "training.objective"
BY_OBJECTIVE = Origin(kind="inferred", where=OBJECTIVE)
MAX_SHOWN_CHARACTERS = 300  # of a value that a message shows


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the command line contains: a settings file, `--set` assignments, and flags by `section.key`.

    `preset` is a settings file that all others override.
    """

    preset: Path | None = None
    config: Path | None = None
    assignments: Sequence[str] = ()
    flags: Mapping[str, tuple[str, Any]] | None = None


@dataclass(frozen=True)
class Resolved(Generic[SettingsT_co]):
    """Validated settings and where each value came from, by `section.key`."""

    settings: SettingsT_co
    origins: Mapping[str, Origin]

    def origin_of(self, path: str) -> Origin:
        """Return the origin of the value of `section.key`."""
        return self.origins.get(path, DEFAULT)

    def is_given(self, path: str) -> bool:
        """Return whether `section.key` was given: in a file, by `--set` or by a flag."""
        return self.origin_of(path).is_given

    def given(self, section: str) -> dict[str, Any]:
        """Return the values of the settings in a section that were given."""
        values: Section = getattr(self.settings, section)
        return {key: getattr(values, key) for key in type(values).model_fields if self.is_given(f"{section}.{key}")}

    def where_of(self, path: str) -> str:
        """Return where the value of `section.key` was given, or the flag that would set it."""
        return self.origins[path].locate(path) if path in self.origins else flag_of(path)

    def problem(self, path: str, error: QloraError) -> Problem:
        """Return an error as a problem with `section.key`, or with the setting that the error itself names."""
        return Problem(where=self.where_of(error.setting or path), message=error.message, hint=error.hint)


def resolve(
    sources: Sources, kind: type[SettingsT], flag_names: Mapping[str, str] | None = None
) -> Resolved[SettingsT]:
    """Merge and validate `sources` into settings of `kind`.

    A file may contain sections that `kind` does not use. Their values are validated too, but nothing in them is
    required, and conflicts between them are left to the commands that use them. If `kind` has a class of its own for a
    section, values are validated by that. `flag_names` maps `section.key` to the flag that sets it, for hints.

    Raises:
        SettingsError: with every problem found.
    """
    merged, problems = merge(sources)
    required = set(kind.model_fields)
    validated, more = _validate(merged, sections_of(kind), required=required, flag_names=flag_names or {})
    problems += more
    if problems:
        raise SettingsError(problems)
    problems = find_conflicts({name: validated[name] for name in kind.model_fields}, merged)
    if problems:
        raise SettingsError(problems)
    if implied := _implied(merged, validated, kind):
        merged = {**merged, **implied}
        validated, _ = _validate(merged, sections_of(kind), required=required, flag_names={})
    settings = kind(**{name: validated[name] for name in kind.model_fields})
    return Resolved(settings, {path: entry.origin for path, entry in merged.items()})


def _implied(
    merged: Mapping[str, SettingEntry], validated: Mapping[str, Section], kind: type[Section]
) -> dict[str, SettingEntry]:
    """Return what the objective of a run implies for settings that are not given, or left open."""
    training: Any = validated.get("training")
    implied: dict[str, SettingEntry] = {}
    for path, value in implied_values(Objective.SFT if training is None else training.objective).items():
        section, key = path.split(".")
        is_open = path not in merged or getattr(validated[section], key) == DataFormat.AUTO
        if section in kind.model_fields and is_open:
            implied[path] = SettingEntry(section=section, key=key, value=value, origin=BY_OBJECTIVE)
    return implied


def merge(sources: Sources) -> tuple[dict[str, SettingEntry], list[Problem]]:
    """Return the entry of each given setting that takes precedence, by `section.key`, and the problems found.

    Raises:
        SettingsError: the file can't be read at all; what it would have given is not missing.
    """
    entries: list[SettingEntry] = []
    problems: list[Problem] = []
    for file in (sources.preset, sources.config):
        if file is not None:
            read, more = read_file(file)
            entries, problems = entries + read, problems + more
    assigned, more = read_assignments(sources.assignments)
    entries += assigned + read_flags(sources.flags or {})
    return {entry.path: entry for entry in entries}, problems + more


def describe(sources: Sources, kind: type[Section] | None = None) -> list[tuple[str, Any, Origin]]:
    """Return each setting with its value and origin, for `qlora config show`; a missing required value is None.

    If `kind` is given, only the settings in its sections.

    Raises:
        SettingsError: with every problem found; a missing value is not a problem.
    """
    merged, problems = merge(sources)
    sections = SECTIONS if kind is None else sections_of(kind)
    _, more = _validate(merged, sections, required=set(), flag_names={})
    more += forbidden_in_files(merged)
    if problems + more:
        raise SettingsError(problems + more)
    rows: list[tuple[str, Any, Origin]] = []
    for section in SECTIONS if kind is None else kind.model_fields:
        for key, field in sections[section].model_fields.items():
            entry = merged.get(f"{section}.{key}")
            if entry is None:
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                rows.append((f"{section}.{key}", default, DEFAULT))
            else:
                value: Any = value_adapter(sections[section], key).validate_python(entry.value)
                rows.append((f"{section}.{key}", value, entry.origin))
    objective = next((value for path, value, _ in rows if path == OBJECTIVE), Objective.SFT)
    implied = implied_values(objective)
    return [
        (path, implied[path], BY_OBJECTIVE) if path in implied and path not in merged else (path, value, origin)
        for path, value, origin in rows
    ]


def _validate(
    merged: Mapping[str, SettingEntry],
    sections: Mapping[str, type[Section]],
    *,
    required: set[str],
    flag_names: Mapping[str, str],
) -> tuple[dict[str, Any], list[Problem]]:
    validated: dict[str, Any] = {}
    problems: list[Problem] = []
    for section, model in sections.items():
        values = {entry.key: entry.value for entry in merged.values() if entry.section == section}
        try:
            validated[section] = model(**values)
        except ValidationError as error:
            seen: set[tuple[str, int]] = set()
            for detail in error.errors():
                key, *inner = detail["loc"]
                position = inner[0] if inner and isinstance(inner[0], int) else 0  # in a list
                missing = detail["type"] == "missing"
                if (str(key), position) in seen or (missing and section not in required):
                    continue
                seen.add((str(key), position))  # a union reports an error for each member; the first is enough
                path = f"{section}.{key}"
                problems.append(_missing(path, flag_names) if missing else _explain(detail, path, merged[path]))
    return validated, problems


def _missing(path: str, flag_names: Mapping[str, str]) -> Problem:
    flag = flag_names.get(path)
    section, key = path.split(".")
    return Problem(
        where=flag or path,
        message=f"is missing. {field_of(path).description or ''}",
        hint=f"Give {flag}, or {key} under {section} in a --config file." if flag else f"Set {path}.",
    )


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"


def _explain(detail: ErrorDetails, path: str, entry: SettingEntry) -> Problem:
    """Return a validation error as a problem in terms of the command line."""
    where = entry.origin.locate(path)
    value = detail["input"] if isinstance(entry.value, list | tuple) else entry.value
    shown = _truncate(repr(value if isinstance(value, str | int | float | bool) else str(value)))
    choices = choices_of(field_of(path))
    if choices and detail["type"] in {"enum", "literal_error"}:
        message = f"{shown} is not one of {', '.join(choices)}"
        hint = hint_for(field_of(path), str(value)) or did_you_mean(str(value), choices)
        return Problem(where=where, message=message, hint=hint)
    if detail["type"] == CUSTOM_ERROR:
        return Problem(where=where, message=detail["msg"], hint=detail["ctx"]["hint"])
    messages = {
        "int_parsing": "expected a whole number",
        "int_from_float": "expected a whole number",
        "int_type": "expected a whole number",
        "float_parsing": "expected a number",
        "float_type": "expected a number",
        "bool_parsing": "expected true or false",
        "string_type": "expected text",
        "string_too_short": "must not be empty",
        "too_short": "must name at least one",
        "path_type": "expected a path",
    }
    expected = messages.get(
        detail["type"], detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    )
    is_number = detail["type"] == "string_type" and isinstance(value, int | float)
    hint = "Put it in quotes: YAML reads it as a number." if is_number else example_of(field_of(path))
    return Problem(where=where, message=f"{expected}, got {shown}", hint=hint)
