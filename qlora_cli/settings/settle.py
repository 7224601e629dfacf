"""Settings settled by what files say: an adapter's, a run's, a checkpoint's, the positions of a model.

After `resolve` this is the only place that changes settings, and that knows which of them were given by name. What
comes of it is frozen as before, with the origin of every value.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from qlora_cli.settings.marks import marks_of
from qlora_cli.settings.models import SECTIONS, DataSettings, Section
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.sources import Origin

SectionT = TypeVar("SectionT", bound=Section)
SettingsT = TypeVar("SettingsT", bound=Section)


def given(section: Section) -> frozenset[str]:
    """Return the settings of a section that were given: by a file, by `--set`, by a flag."""
    return frozenset(section.model_fields_set)


def given_values(section: Section) -> dict[str, Any]:
    """Return the settings of a section that were given, with their values."""
    return {key: getattr(section, key) for key in sorted(given(section))}


def changed(section: SectionT, **values: object) -> SectionT:
    """Return a section with other, valid values of some of its settings, which count as given from then on."""
    return section.model_copy(update=values)


def with_values(settings: SettingsT, values: Mapping[str, object]) -> SettingsT:
    """Return the settings of a command with other, valid values of some, by `section.key`."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = value
    return settings.model_copy(
        update={name: changed(getattr(settings, name), **update) for name, update in sections.items()}
    )


def with_sections(settings: SettingsT, **sections: Section) -> SettingsT:
    """Return the settings of a command with other sections."""
    return settings.model_copy(update=sections)


def taken_from(resolved: Resolved[SettingsT], values: Mapping[str, object], where: Origin) -> Resolved[SettingsT]:
    """Return settings with `values`, by `section.key`, in their place, and `where` as the origin of these."""
    origins = {**resolved.origins, **dict.fromkeys(values, where)}
    return Resolved(with_values(resolved.settings, values), origins)


def over_recorded(asked: SectionT, recorded: Mapping[str, Any]) -> SectionT:
    """Return the settings that a run or a checkpoint recorded, with those that were given in their place.

    What runs code that comes with a model holds only where it was given: a record may be somebody else's.

    Raises:
        ValidationError: the record can't be read.
    """
    by_hand = {key for key, field in type(asked).model_fields.items() if marks_of(field).is_only_by_hand}
    trusted = {key: value for key, value in recorded.items() if key not in by_hand}
    return type(asked).model_validate({**trusted, **given_values(asked)})


def of_run(section: str, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what of a section that a run recorded says how its base is loaded."""
    known = {key for key, field in SECTIONS[section].model_fields.items() if marks_of(field).is_of_run}
    return {key: value for key, value in (recorded or {}).items() if key in known}


def differences(section: str, asked: Section, recorded: Mapping[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """Return by `section.key` what was given and is not what a run was trained with, and what that is."""
    of_then, of_now = of_run(section, recorded), given_values(asked)
    return {
        f"{section}.{key}": (of_now[key], of_then[key])
        for key in sorted(of_now.keys() & of_then.keys())
        if of_now[key] != of_then[key]
    }


def asked_length(data: DataSettings) -> int | None:
    """Return the longest row that was asked for; None if the default may be lowered to what the model has."""
    return data.max_length if "max_length" in given(data) else None


def within_positions(data: DataSettings, positions: int | None) -> DataSettings:
    """Return the settings with the default `max_length` lowered to the positions that the model has."""
    if asked_length(data) is not None or positions is None or data.max_length <= positions:
        return data
    return changed(data, max_length=positions)
