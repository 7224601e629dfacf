"""Settings settled by what is found: an adapter's, a run's, a checkpoint's, the positions of a model, what fits.

`resolve` says what was asked for. What is found of the same settings are facts; `settle` joins both, once, into one
frozen value that knows where each setting comes from. Nothing else changes the settings of a run, and nothing else
knows which of them were given.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from qlora_cli.errors import ModelError
from qlora_cli.settings.models import SECTIONS, Section, metadata_of
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.setting_metadata import field_metadata
from qlora_cli.settings.value_sources import Origin

SettingsT = TypeVar("SettingsT", bound=Section)
SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, kw_only=True)
class InferredSettings:
    """What is known of settings besides what was asked for.

    Attributes:
        values: By `section.key`, as a setting holds them or as JSON does.
        origin: Where they are known from.
        is_fixed: Whether they hold whatever was asked for: who states the fact has refused what contradicts it. Else
            what was given stands.
        is_foreign: Whether they may be such as nobody can ask for here: those of an adapter that others trained.
    """

    values: Mapping[str, object]
    origin: Origin
    is_fixed: bool = False
    is_foreign: bool = False


def inferred_origin(where: object) -> Origin:
    """Return the origin of what is known from `where`: a file, or what settled it in words."""
    return Origin(kind="inferred", where=str(where))


def settle(asked: Resolved[SettingsT], facts: Iterable[InferredSettings]) -> Resolved[SettingsT]:
    """Return what was asked for with the `facts` in their places.

    A later fact goes over an earlier one, and those that are fixed over the rest.

    Facts of sections that the command has no use for, and of settings of another version, are left out. What runs code
    that comes with a model holds only where it was given: a file may be somebody else's. What agrees with what is
    there keeps its origin.

    Raises:
        ModelError: a fact can't be read.
    """
    settings, origins = asked.settings, dict(asked.origins)
    for fact in sorted(facts, key=lambda fact: fact.is_fixed):
        for name, values in _by_section(fact, asked).items():
            before: Section = getattr(settings, name)
            after = _with(before, values, fact)
            for key in values:
                if getattr(after, key) != getattr(before, key):
                    origins[f"{name}.{key}"] = fact.origin
            settings = settings.model_copy(update={name: after})
    return Resolved(settings, origins)


def _by_section(fact: InferredSettings, asked: Resolved[SettingsT]) -> dict[str, dict[str, object]]:
    sections: dict[str, dict[str, object]] = {}
    for path, value in fact.values.items():
        section, key = path.split(".")
        if section not in type(asked.settings).model_fields:
            continue
        is_known = key in SECTIONS[section].model_fields  # else it is of another version
        stands = asked.is_given(path) and not fact.is_fixed
        if is_known and not stands and not metadata_of(path).is_forbidden_in_files:
            sections.setdefault(section, {})[key] = value
    return sections


def _with(section: SectionT, values: Mapping[str, object], fact: InferredSettings) -> SectionT:
    if fact.is_foreign:
        return section.model_copy(update=values)
    try:
        return type(section).model_validate({**dict(section), **values})
    except ValidationError as error:
        detail = error.errors()[0]
        raise ModelError(
            f"the settings in {fact.origin.where} can't be read: {'.'.join(map(str, detail['loc']))}: {detail['msg']}",
            hint="Was it written by a newer qlora?",
        ) from error


def resolved_in_code(settings: SettingsT) -> Resolved[SettingsT]:
    """Return settings that code made, of which what it named counts as given."""
    where = Origin(kind="code", where="given in code")
    return Resolved(
        settings,
        {
            f"{name}.{key}": where
            for name in type(settings).model_fields
            for key in sorted(getattr(settings, name).model_fields_set)
        },
    )


def with_values(section: SectionT, **values: object) -> SectionT:
    """Return a section of another load, run or look at the data, which is like this one but for some valid values."""
    return section.model_copy(update=values)


def with_settings(settings: SettingsT, values: Mapping[str, object]) -> SettingsT:
    """Return the settings of another run, which is like this one but for some valid values, by `section.key`."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = value
    return settings.model_copy(
        update={name: with_values(getattr(settings, name), **update) for name, update in sections.items()}
    )


def loading_settings(section: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a section that a run recorded says how its base is loaded."""
    known = {key for key, field in SECTIONS[section].model_fields.items() if field_metadata(field).is_inherited}
    return {key: value for key, value in recorded.items() if key in known}


def inferred_from_run(recorded: Mapping[str, Mapping[str, Any]], where: object) -> InferredSettings:
    """Return what the sections that a run `recorded` say of how its base is loaded."""
    model, quantization = recorded.get("model", {}), recorded.get("quantization", {})
    values = {**by_path("model", loading_settings("model", model)), **by_path("quantization", quantization)}
    return InferredSettings(values=values, origin=inferred_origin(where))


def by_path(section: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return values by `section.key`."""
    return {f"{section}.{key}": value for key, value in values.items()}
