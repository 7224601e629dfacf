"""Settings as text for people: flags, accepted values, defaults."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

from pydantic.fields import FieldInfo

from qlora_cli.settings.enumerated import Choice
from qlora_cli.settings.models import field_of, metadata_of
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import field_metadata

METAVARS: tuple[tuple[type, str], ...] = ((int, "INTEGER"), (float, "NUMBER"), (Path, "DIRECTORY"))


def display_name(field: FieldInfo) -> str:
    """Return the name of a setting on the command line: its flag, or its argument in capitals."""
    metadata = field_metadata(field)
    return metadata.flag or str(metadata.metavar)


def flag_of(path: str) -> str:
    """Return the flag or argument of the setting `section.key`."""
    return display_name(field_of(path))


def flags_of(values: Mapping[str, object]) -> str:
    """Return values by `section.key` as the flags that set them."""
    return " ".join(
        f"{metadata_of(path).flag}" if value is True else f"{metadata_of(path).flag} {_listed(value)}"
        for path, value in values.items()
    )


def display_flags(section: Section) -> dict[str, str]:
    """Return the settings that have a flag and an effect, as text, by the flag's name without dashes."""
    flags = {key: field_metadata(type(section).model_fields[key]).flag for key in section.in_effect()}
    return {
        flag.removeprefix("--"): _on_or_off(getattr(section, key)) for key, flag in flags.items() if flag is not None
    }


def is_switch(field: FieldInfo) -> bool:
    """Return whether the setting is a boolean."""
    return field.annotation is bool or field.annotation == bool | None


def choices_of(field: FieldInfo) -> list[str]:
    """Return the values of an enumerated setting; empty for any other."""
    return [choice.value for kind in _choices(field) for choice in kind]


def synonyms_of(field: FieldInfo) -> dict[str, str]:
    """Return the synonyms of the values of an enumerated setting, each with its value."""
    return {synonym: value for kind in _choices(field) for synonym, value in kind.synonyms().items()}


def hint_for(field: FieldInfo, value: str) -> str | None:
    """Return what to choose instead of an invalid `value`, if the setting knows more than similar spellings."""
    return next((hint for kind in _choices(field) if (hint := kind.hint_for(value))), None)


def _choices(field: FieldInfo) -> list[type[Choice]]:
    return [kind for kind in _parts(field.annotation) if issubclass(kind, Choice)]


def _parts(annotation: object) -> list[type]:
    """Return the types in an annotation: `int` for `int | None` and `tuple[int, ...]`."""
    if get_origin(annotation) in (Union, UnionType, tuple):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation] if isinstance(annotation, type) else []


def metavar(field: FieldInfo) -> str:
    """Return the placeholder of a flag's value in help: its choices, or the kind of value."""
    if custom := field_metadata(field).metavar:
        return custom
    if choices := choices_of(field):
        return "|".join(choices)
    annotation = str(field.annotation)
    return next((name for kind, name in METAVARS if kind.__name__ in annotation), "TEXT")


def display_default(field: FieldInfo) -> str | None:
    """Return the default as it is written in a settings file; None if there is none."""
    default = None if field.is_required() else field.default
    if default is None or default == ():
        return None
    return _listed(default)


def example_of(field: FieldInfo) -> str | None:
    """Return a hint for a setting with an invalid value: its default, or its description."""
    default = display_default(field)
    return f"The default is {default}." if default else field.description


def _on_or_off(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else _listed(value)


def _listed(value: object) -> str:
    return ",".join(map(_shown, value)) if isinstance(value, tuple) else _shown(value)


def _shown(value: object) -> str:
    plain = value.value if isinstance(value, Enum) else value
    return str(plain).lower() if isinstance(plain, bool) else str(plain)
