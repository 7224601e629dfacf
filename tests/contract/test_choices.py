"""Every setting that takes one of several words reads them in any case and by their synonyms, however it is given."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.settings.display import choices_of, synonyms_of
from qlora_cli.settings.enumerated import DTYPE_NAMES
from qlora_cli.settings.models import all_settings, field_of, json_schema
from qlora_cli.settings.resolve import Sources, describe

CHOICES = [path for path in all_settings() if choices_of(field_of(path))]
SCHEMA = json_schema()


def words_of(path: str) -> dict[str, str]:
    """Return what may be written for a setting, with the choice that is meant: as it is, in capitals, otherwise."""
    meant = {**{word: word for word in choices_of(field_of(path))}, **synonyms_of(field_of(path))}
    return meant | {word.upper(): choice for word, choice in meant.items()}


def read(path: str, sources: Sources) -> str:
    """Return the choice that a setting resolves to; for one that takes several, the only one."""
    value: Any = next(value for name, value, _ in describe(sources) if name == path)
    (choice,) = value if isinstance(value, tuple) else (value,)
    return str(choice.value)


def in_schema(value: object, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON schema takes a value, as far as those of settings go."""
    if "$ref" in schema:
        return in_schema(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    kinds = {"string": str, "array": list, "boolean": bool, "null": type(None), "number": int | float}
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if "anyOf" in schema and not any(in_schema(value, each) for each in schema["anyOf"]):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(in_schema(item, schema["items"]) for item in value)
    if "pattern" in schema and not re.search(schema["pattern"], str(value)):
        return False
    return "enum" not in schema or value in schema["enum"]


def schema_of(path: str) -> Mapping[str, Any]:
    """Return the JSON schema of a setting."""
    section, key = path.split(".")
    reference = SCHEMA["properties"][section]["$ref"].rpartition("/")[2]
    return dict(SCHEMA["$defs"][reference]["properties"][key])


def given_in_every_way(path: str, word: str, place: Path) -> Iterator[Sources]:
    """Yield a word given by a flag, by `--set`, and in a file, there both quoted and unquoted."""
    section, key = path.split(".")
    yield Sources(flags={path: ("--flag", word)})
    yield Sources(assignments=[f"{path}={word}"])
    for text in (word, f"'{word}'"):
        place.write_text(f"{section}:\n  {key}: {text}\n", encoding="utf-8")
        yield Sources(config=place)


def test_there_are_settings_with_choices_and_synonyms() -> None:
    assert len(CHOICES) >= 20
    assert {"model.dtype", "quantization.quant_storage", "merge.dtype", "merge.gguf_type", "quantization.method"} <= {
        path for path in CHOICES if synonyms_of(field_of(path))
    }


@pytest.mark.parametrize("path", CHOICES)
def test_each_word_is_read_in_capitals_and_by_each_synonym_however_it_is_given(path: str, tmp_path: Path) -> None:
    for word, choice in words_of(path).items():
        read_as = [read(path, sources) for sources in given_in_every_way(path, word, tmp_path / "settings.yaml")]
        assert read_as == [choice] * 4, word


@pytest.mark.parametrize("path", CHOICES)
def test_the_schema_takes_what_is_read_and_nothing_else(path: str) -> None:
    schema = schema_of(path)
    assert [word for word in words_of(path) if not in_schema(word, schema)] == []
    assert not in_schema("nonsense", schema)
    assert not in_schema(f"{choices_of(field_of(path))[0]}x", schema)


@pytest.mark.parametrize("path", [path for path in CHOICES if "bf16" in choices_of(field_of(path))])
def test_a_choice_among_dtypes_is_read_by_every_name_of_each(path: str) -> None:
    for names in DTYPE_NAMES:
        if own := set(names) & set(choices_of(field_of(path))):
            assert set(names) - own == {word for word, choice in synonyms_of(field_of(path)).items() if choice in own}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.gradient_checkpointing", True),
        ("merge.formats", ["hf", "NF4"]),
        ("inspect_memory.solve", "rank"),
        ("lora.target_modules", "q_proj,v_proj"),
        ("lora.target_modules", ["q_proj"]),
        ("lora.rank_pattern", "q_proj=8"),
        ("data.dataset", "rows.jsonl"),
        ("data.eval_split", 100),
        ("data.eval_split", 0.1),
        ("merge.weights", 0.5),
        ("model.new_tokens", None),
    ],
)
def test_the_schema_takes_what_may_be_written_instead_of_a_list(path: str, value: object, tmp_path: Path) -> None:
    section, key = path.split(".")
    (tmp_path / "settings.yaml").write_text(json.dumps({section: {key: value}}), encoding="utf-8")
    assert describe(Sources(config=tmp_path / "settings.yaml"))
    assert in_schema(value, schema_of(path))


def test_typed_words_that_are_not_choices_are_read_in_any_case_too() -> None:
    values = {
        path: value
        for path, value, _ in describe(
            Sources(
                assignments=[
                    "lora.target_modules=All-Linear",
                    "lora.target_parameters=ALL-EXPERTS",
                    "model.rope_scaling=YaRN:4",
                    "output.resume=NEVER",
                ]
            )
        )
    }
    assert values["lora.target_modules"] == "all-linear"
    assert values["lora.target_parameters"] == "all-experts"
    assert values["model.rope_scaling"] == "yarn:4"
    assert values["output.resume"] == "never"
