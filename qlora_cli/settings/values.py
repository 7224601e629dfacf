"""The types of settings' values, and how each is parsed from a flag or a settings file."""

import re
from collections.abc import Collection, Mapping
from math import inf
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from qlora_cli.settings.choices import Checkpointing, ExportFormat, Solvable

CUSTOM_ERROR = "refused"  # the type of a validation error with a message and hint of its own


def either(names: Collection[str]) -> str:
    """Return alternatives as text: `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def read_switch(value: object) -> object:
    # YAML 1.1 reads a bare `on` and `off` as booleans.
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _split_commas(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lower() in {"all-linear", "all-experts"}:
        return value.lower()
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:
        raise ValueError("must name at least one")
    return parts


def _check_rope_scaling(value: str | None) -> str | None:
    if value is None:
        return None
    kind, _, factor = value.lower().partition(":")
    if kind not in ROPE_TYPES or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", factor) or not 1 < float(factor) < inf:
        raise ValueError(f"expected TYPE:FACTOR, TYPE one of {', '.join(ROPE_TYPES)} and FACTOR above 1")
    return f"{kind}:{factor}"


def _read_resume(value: str) -> str:
    return value.lower() if value.lower() in {"auto", "never"} else value


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _read_pairs(value: object) -> object:
    """Parse `ours=theirs,…` into a mapping; a settings file may contain the mapping itself."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not pairs or any(not equals or not ours.strip() or not theirs.strip() for ours, equals, theirs in pairs):
        raise ValueError("expected pairs such as name=value,other=value")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _read_bytes(value: object) -> object:
    """Parse a size such as `6GiB` or `500 MB`; a number is one of bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError as error:
        raise ValueError("expected a size such as 6GiB or 500MB") from error


def value_error(message: str, hint: str) -> PydanticCustomError:
    """Return a validation error with a message and hint of its own."""
    return PydanticCustomError(CUSTOM_ERROR, message.replace("{", "{{").replace("}", "}}"), {"hint": hint})


def check_prompt(text: str) -> str:
    """Return a prompt if it is valid.

    Raises:
        PydanticCustomError: it is empty, or has lone surrogates.
    """
    if not text.strip():
        raise value_error("is empty", "Give some text, or - to read a prompt from stdin.")
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's surrogate escapes of invalid bytes
        raise value_error("is not UTF-8", "Check the encoding of your terminal or file.")
    return text


def _as_numbers(value: object) -> object:
    return [value] if isinstance(value, str | int | float) else value


def _check_repository(value: str) -> str:
    if not value:
        raise value_error("names no repository", "Give OWNER/NAME.")
    return value


def _check_nats(value: object) -> object:
    number = _number(value)
    if number is not None and not 0 <= number < inf:
        raise value_error(f"must be a number of nats ≥ 0, got {number:g}", "Such as 0.001.")
    return value


def _number(value: object) -> float | None:
    """Return a value as a number; None if it is not one."""
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None


def held_out_share(text: str) -> float | int | None:
    """Return what `eval_split` holds out: a share below 1, or a number of rows; None if it names a split.

    Raises:
        ValueError: the share or the number is out of range.
    """
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)? *%?", text):
        return None
    number = float(text.removesuffix("%"))
    if text.endswith("%") and 0 < number < 100:
        return number / 100
    if not text.endswith("%") and 0 < number < 1:
        return number
    if not text.endswith("%") and 1 <= number < inf and number == int(number):
        return int(number)
    raise ValueError("expected a share above 0% and below 100%, a whole number of rows, or the name of a split")


def check_eval_split(value: object) -> object:
    # YAML reads a bare number as one.
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        held_out_share(text)
    return text


# A list may be given as one text or one value, and a mapping as a text; the JSON schema allows these, too.
ROPE_TYPES = ("linear", "dynamic", "yarn")
RopeScaling = Annotated[str | None, AfterValidator(_check_rope_scaling)]
Name = Annotated[str, Field(min_length=1)]
Resume = Annotated[Name, AfterValidator(_read_resume)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
_SomeNames = Annotated[tuple[Name, ...], Field(min_length=1)]
TargetModules = Annotated[
    Literal["all-linear"] | Names,
    BeforeValidator(_split_commas, json_schema_input_type=Literal["all-linear"] | str | Names),
]
TargetParameters = Annotated[
    Literal["all-experts"] | Names | None,
    BeforeValidator(_split_commas, json_schema_input_type=Literal["all-experts"] | str | Names | None),
]
NameList = Annotated[Names | None, BeforeValidator(_split_commas, json_schema_input_type=str | Names | None)]
DistinctNames = Annotated[
    tuple[str, ...],
    BeforeValidator(_split_commas, json_schema_input_type=str | tuple[str, ...]),
    AfterValidator(lambda names: tuple(dict.fromkeys(names))),
]
PromptText = Annotated[str, AfterValidator(check_prompt)]
_SomePrompts = Annotated[tuple[PromptText, ...], Field(min_length=1)]
Prompts = Annotated[_SomePrompts, BeforeValidator(as_list, json_schema_input_type=PromptText | _SomePrompts)]
_Numbers = tuple[Annotated[float, Field(allow_inf_nan=True)], ...]
Weights = Annotated[_Numbers, BeforeValidator(_as_numbers, json_schema_input_type=float | _Numbers)]
Repository = Annotated[str, AfterValidator(_check_repository)]
NumBytes = Annotated[int, BeforeValidator(_read_bytes, json_schema_input_type=int | str), Field(gt=0)]
Nats = Annotated[float, BeforeValidator(_check_nats)]
_SomeFormats = Annotated[tuple[ExportFormat, ...], Field(min_length=1)]
Formats = Annotated[
    _SomeFormats,
    BeforeValidator(as_list, json_schema_input_type=ExportFormat | _SomeFormats),
    AfterValidator(lambda formats: tuple(dict.fromkeys(formats))),
]
Words = Annotated[tuple[Name, ...], BeforeValidator(as_list, json_schema_input_type=Name | tuple[Name, ...])]
Solvables = Annotated[
    tuple[Solvable, ...],
    BeforeValidator(as_list, json_schema_input_type=Solvable | tuple[Solvable, ...]),
    AfterValidator(lambda names: tuple(dict.fromkeys(names))),
]
Datasets = Annotated[_SomeNames, BeforeValidator(as_list, json_schema_input_type=Name | _SomeNames)]
Texts = Annotated[_SomeNames | None, BeforeValidator(as_list, json_schema_input_type=Name | _SomeNames | None)]
Rank = Annotated[int, Field(ge=1, le=4096)]
_Ranks = Mapping[str, Rank] | None
Ranks = Annotated[_Ranks, BeforeValidator(_read_pairs, json_schema_input_type=str | _Ranks)]
_Alphas = Mapping[str, Annotated[float, Field(gt=0)]] | None
Alphas = Annotated[_Alphas, BeforeValidator(_read_pairs, json_schema_input_type=str | _Alphas)]
_Columns = Mapping[str, Name] | None
Columns = Annotated[_Columns, BeforeValidator(_read_pairs, json_schema_input_type=str | _Columns)]
HeldOut = Annotated[Name | None, BeforeValidator(check_eval_split, json_schema_input_type=Name | float | None)]
# `auto`, `on`, `off`, or the path of a file.
ON, OFF, WHERE_CHEAP = "on", "off", "auto"
SwitchOrFile = Annotated[Name, BeforeValidator(read_switch, json_schema_input_type=Name | bool)]
CheckpointingSwitch = Annotated[
    Checkpointing, BeforeValidator(read_switch, json_schema_input_type=Checkpointing | bool)
]
