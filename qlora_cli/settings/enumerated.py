"""What all enumerated settings have in common: any case, synonyms, and their schema."""

from enum import StrEnum
from typing import Any, Self

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

# The names of a dtype: here, in llama.cpp, in PyTorch. A choice with one name of a line accepts all of them.
DTYPE_NAMES = (
    ("bf16", "bfloat16", "torch.bfloat16"),
    ("fp16", "f16", "float16", "half", "torch.float16", "torch.half"),
    ("fp32", "f32", "float32", "float", "torch.float32", "torch.float"),
    ("uint8", "torch.uint8"),
)


class Choice(StrEnum):
    """An enumerated setting, whose values are read in any case, and by their synonyms."""

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return the values by their synonyms, in lower case."""
        return {}

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to choose instead of an invalid `value`, if more is known than similar spellings."""
        del value
        return None

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        word = cls.synonyms().get(value.lower(), value.lower())
        return next((member for member in cls if member.value == word), None)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        words = [*schema.pop("enum"), *cls.synonyms()]
        # An editor suggests the words of `enum`; the pattern accepts them in any case.
        schema["anyOf"] = [{"enum": words}, {"pattern": f"^({'|'.join(map(_in_any_case, words))})$"}]
        return reference


def _in_any_case(word: str) -> str:
    """Return a regular expression for a word in any case; JSON Schema has no flag for it."""
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else f"[{letter}]" for letter in word)


class DtypeChoice(Choice):
    """An enumerated setting of dtypes, which also accepts their names in other libraries."""

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return the dtypes by their other names."""
        return {
            name: member.value
            for member in cls
            for names in DTYPE_NAMES
            if member.value in names
            for name in names
            if name != member.value
        }
