"""Settle settings: what the user asked for, completed by what an adapter, a run, a checkpoint or the model implies.

`resolve` returns what was asked for. `settle` merges it once with the settings that are inferred from files and the
machine, into one frozen value that records where each setting comes from. Nothing else changes the settings of a run,
and nothing else knows which of them were given.
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
    """Settings that are not asked for but inferred from a file or the machine.

    Attributes:
        values: The values by `section.key`, as settings or as JSON.
        origin: Where they come from.
        is_fixed: Whether they override what was given; the caller has refused what contradicts them. Otherwise what
            was given takes precedence.
        is_foreign: Whether they are not validated: those of an adapter from another tool may be outside our bounds.
    """

    values: Mapping[str, object]
    origin: Origin
    is_fixed: bool = False
    is_foreign: bool = False


def inferred_origin(where: object) -> Origin:
    """Return the origin of inferred settings: a file, or a description of what determined them."""
    return Origin(kind="inferred", where=str(where))


def settle(asked: Resolved[SettingsT], inferred: Iterable[InferredSettings]) -> Resolved[SettingsT]:
    """Return what was asked for, completed by the `inferred` settings.

    Later ones override earlier ones, and fixed ones override all others. Sections that the command does not use, and
    settings of other versions, are ignored. A setting that runs code from the model is never inferred: a file may be
    somebody else's. A value that does not change keeps its origin, unless it was provisional.

    Raises:
        ModelError: an inferred value is invalid.
    """
    settings, origins = asked.settings, dict(asked.origins)
    for source in sorted(inferred, key=lambda source: source.is_fixed):
        for name, values in _by_section(source, asked).items():
            before: Section = getattr(settings, name)
            after = _with_inferred(before, values, source)
            for key in values:
                path = f"{name}.{key}"
                is_provisional = path in origins and origins[path].kind == "provisional"
                if is_provisional or getattr(after, key) != getattr(before, key):
                    origins[path] = source.origin
            settings = settings.model_copy(update={name: after})
    return Resolved(settings, origins)


def _by_section(inferred: InferredSettings, asked: Resolved[SettingsT]) -> dict[str, dict[str, object]]:
    sections: dict[str, dict[str, object]] = {}
    for path, value in inferred.values.items():
        section, key = path.split(".")
        if section not in type(asked.settings).model_fields:
            continue
        is_known = key in SECTIONS[section].model_fields  # not if another version wrote it
        is_overridden = asked.is_given(path) and not inferred.is_fixed
        if is_known and not is_overridden and not metadata_of(path).is_forbidden_in_files:
            sections.setdefault(section, {})[key] = value
    return sections


def _with_inferred(section: SectionT, values: Mapping[str, object], inferred: InferredSettings) -> SectionT:
    if inferred.is_foreign:
        return section.model_copy(update=values)
    try:
        return type(section).model_validate({**dict(section), **values})
    except ValidationError as error:
        detail = error.errors()[0]
        raise ModelError(
            f"the settings in {inferred.origin.where} can't be read: "
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}",
            hint="Was it written by a newer qlora?",
        ) from error


def resolved_in_code(settings: SettingsT) -> Resolved[SettingsT]:
    """Return settings that were created in code; those that it set count as given."""
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
    """Return a copy of a section, for another load, run or preview, with some other valid values."""
    return section.model_copy(update=values)


def with_settings(settings: SettingsT, values: Mapping[str, object]) -> SettingsT:
    """Return a copy of the settings, for another run, with some other valid values, by `section.key`."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = value
    return settings.model_copy(
        update={name: with_values(getattr(settings, name), **update) for name, update in sections.items()}
    )


def loading_settings(section: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return those `recorded` settings of a section that determine how a run loads its base."""
    inherited = {key for key, field in SECTIONS[section].model_fields.items() if field_metadata(field).is_inherited}
    return {key: value for key, value in recorded.items() if key in inherited}


def inferred_from_run(recorded: Mapping[str, Mapping[str, Any]], where: object) -> InferredSettings:
    """Return how a run loads its base, inferred from the sections that it `recorded`."""
    model, quantization = recorded.get("model", {}), recorded.get("quantization", {})
    values = {**by_path("model", loading_settings("model", model)), **by_path("quantization", quantization)}
    return InferredSettings(values=values, origin=inferred_origin(where))


def by_path(section: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return values by `section.key`."""
    return {f"{section}.{key}": value for key, value in values.items()}
