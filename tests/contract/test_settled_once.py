"""Settings have one owner: outside `settings/` nobody changes them, or knows by itself which of them were given."""

import re
from pathlib import Path

import pytest

import qlora_cli
from qlora_cli.settings.models import DataSettings, LoraSettings, TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.settings.settle import asked_length, given, over_recorded, taken_from, within_positions
from qlora_cli.settings.sources import Origin

PACKAGE = Path(qlora_cli.__file__).parent
OWNED = re.compile(r"model_fields_set|model_copy\(|model_construct\(")
FLAGS = {"model.name": "m", "data.dataset": "d", "output.directory": "o"}


def resolved(**values: str) -> Resolved[TrainSettings]:
    flags = {**FLAGS, **{name.replace("__", "."): value for name, value in values.items()}}
    return resolve(Sources(flags={path: (path, value) for path, value in flags.items()}), TrainSettings)


def test_only_the_settings_change_settings_and_know_which_were_given() -> None:
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if OWNED.search(path.read_text(encoding="utf-8"))
    ]
    assert found == ["settings/settle.py"]


def test_what_was_given_is_what_has_an_origin() -> None:
    settings = resolved(lora__rank="8", training__seed="0")
    sections = {name: given(getattr(settings.settings, name)) for name in TrainSettings.model_fields}
    assert {f"{name}.{key}" for name, keys in sections.items() for key in keys} == set(settings.origins)


def test_what_a_file_says_takes_its_place_with_its_origin() -> None:
    before = resolved(lora__rank="8")
    where = Origin(kind="file", where="adapter_config.json")
    after = taken_from(before, {"lora.rank": 4, "training.micro_batch_size": 2}, where)
    assert (after.settings.lora.rank, after.settings.training.micro_batch_size) == (4, 2)
    assert (after.origin_of("lora.rank"), after.origin_of("training.micro_batch_size")) == (where, where)
    assert after.origin_of("model.name").kind == "flag"
    assert (before.settings.lora.rank, before.origin_of("lora.rank").kind) == (8, "flag")


@pytest.mark.parametrize(
    ("asked", "positions", "length", "is_asked"),
    [
        ({}, None, 2048, False),
        ({}, 512, 512, False),
        ({}, 4096, 2048, False),
        ({"max_length": 1024}, 512, 1024, True),
        ({"max_length": 2048}, 512, 2048, True),
    ],
)
def test_a_length_that_was_not_asked_for_is_lowered_to_the_positions(
    asked: dict[str, int], positions: int | None, length: int, is_asked: bool
) -> None:
    data = DataSettings.model_validate({"dataset": "d", **asked})
    assert within_positions(data, positions).max_length == length
    assert asked_length(data) == (length if is_asked else None)


def test_what_was_given_stands_over_what_a_run_recorded() -> None:
    recorded = {"rank": 64, "alpha": 8.0, "dropout": 0.1}
    lora = over_recorded(LoraSettings(rank=4), recorded)
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 8.0, 0.1)
