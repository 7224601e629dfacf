"""What every section of settings has in common."""

from collections.abc import Mapping
from typing import ClassVar, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationInfo, field_validator

from qlora_cli.settings.setting_metadata import field_metadata


class Section(BaseModel):
    """A group of settings: frozen, with finite numbers; an unknown name is an error."""

    # Validators are built when they are first needed: `--help` needs none.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    # Names that are no settings, or no flags, any more or in other tools only, each with a hint for users who give it.
    removed: ClassVar[Mapping[str, str]] = {}

    def has_effect(self, key: str) -> bool:
        """Return whether the setting `key` has an effect with the others of its section, by its metadata."""
        needed = field_metadata(type(self).model_fields[key]).effective_with
        if needed is None:
            return True
        chosen = getattr(self, needed.key)
        return any(value in needed.values for value in (chosen if isinstance(chosen, tuple) else (chosen,)))

    def in_effect(self) -> dict[str, JsonValue]:
        """Return the settings that have an effect with the others, as JSON values."""
        return {key: value for key, value in self.model_dump(mode="json").items() if self.has_effect(key)}

    @field_validator("*", mode="before")
    @classmethod
    def _reject_boolean_as_number(cls, value: object, info: ValidationInfo) -> object:
        # Python counts True as 1, so a bare `yes` in YAML would silently be a seed.
        assert info.field_name is not None
        if _contains_boolean(value) and _takes_numbers(cls.model_fields[info.field_name].annotation):
            raise ValueError("expected a number")
        return value


def _contains_boolean(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_contains_boolean, value.values()))
    return any(map(_contains_boolean, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _takes_numbers(annotation: object) -> bool:
    """Return whether a type is, or contains, a number: `int | None`, a tuple or a mapping of bounded ones."""
    return annotation is int or annotation is float or any(map(_takes_numbers, get_args(annotation)))
