"""What every section of settings has in common."""

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """A group of settings: frozen, its numbers finite, and an unknown name in it is an error."""

    # Validators are built when they are first needed: `--help` needs none.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_a_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # Python counts True as 1, so a bare `yes` in YAML would silently be a seed.
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in NUMBERS:
            raise ValueError("expected a number")
        return value
