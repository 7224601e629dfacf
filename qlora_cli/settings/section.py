"""What every section of settings has in common."""

from collections.abc import Mapping
from typing import ClassVar, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationInfo, field_validator

from qlora_cli.settings.setting_metadata import field_metadata


class Section(BaseModel):
    """A group of settings: frozen, its numbers finite, and an unknown name in it is an error."""

    # Validators are built when they are first needed: `--help` needs none.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    # Names that were settings once, each with a hint for whoever still gives it.
    removed: ClassVar[Mapping[str, str]] = {}

    def has_effect(self, key: str) -> bool:
        """Whether the setting `key` has an effect with the others of its section, by the marks of its field."""
        needed = field_metadata(type(self).model_fields[key]).effective_with
        if needed is None:
            return True
        chosen = getattr(self, needed.key)
        return any(value in needed.values for value in (chosen if isinstance(chosen, tuple) else (chosen,)))

    def in_effect(self) -> dict[str, JsonValue]:
        """Return the settings that have an effect with the others, in plain values."""
        return {key: value for key, value in self.model_dump(mode="json").items() if self.has_effect(key)}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_a_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # Python counts True as 1, so a bare `yes` in YAML would silently be a seed.
        assert info.field_name is not None
        if _holds_switch(value) and _takes_numbers(cls.model_fields[info.field_name].annotation):
            raise ValueError("expected a number")
        return value


def _holds_switch(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_switch, value.values()))
    return any(map(_holds_switch, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _takes_numbers(annotation: object) -> bool:
    """Whether a value is, or holds, a number: `int | None`, a tuple or a mapping of bounded ones."""
    return annotation is int or annotation is float or any(map(_takes_numbers, get_args(annotation)))
