"""A setting given at its default value asks for nothing, so it is neither refused nor reported."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.opening.name_checks import data_problems
from qlora_cli.errors import SettingsError
from qlora_cli.settings.choices import METHODS, Schedule
from qlora_cli.settings.models import KINDS, Section, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve

NEEDED = {
    "model.name": "m",
    "data.dataset": "d.jsonl",
    "output.directory": "run",
    "merge.adapters": "run",
    "generate.prompts": "Hello",
}
# In combination with these, some settings have no effect, or are unavailable.
CONTEXTS: tuple[dict[str, Any], ...] = (
    {},
    *({"quantization.method": method} for method in METHODS),
    *({"training.schedule": schedule} for schedule in Schedule),
    {"training.optimizer": "sgd"},
    {"training.optimizer": "lion_8bit"},
    {"training.gradient_checkpointing": "offload"},
    {"training.max_steps": "5", "data.streaming": True},
    {"data.packing": True},
    {"data.on_long": "error"},
    {"lora.target_parameters": "all-experts"},
    {"merge.verify": False},
)


def refused(kind: type[Section], values: dict[str, Any]) -> list[str]:
    """Return the problems of the given settings that are refused, each under the path of its setting."""
    flags = {
        path: (path, value) for path, value in (NEEDED | values).items() if path[: path.find(".")] in sections(kind)
    }
    try:
        resolve(Sources(flags=flags), kind)
    except SettingsError as error:
        return [f"{problem.where}: {problem.message}" for problem in error.problems]
    return []


def sections(kind: type[Section]) -> set[str]:
    return set(kind.model_fields)


def defaults(kind: type[Section]) -> dict[str, Any]:
    """Return every setting of a command that has a default, with that default."""
    return {
        f"{name}.{key}": field.default
        for name, section in kind.model_fields.items()
        for key, field in section.annotation.model_fields.items()  # type: ignore[union-attr]
        if not field.is_required()
    }


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: ",".join(map(str, context.values())) or "nothing")
@pytest.mark.parametrize("kind", KINDS.values())
def test_a_default_that_is_given_is_never_refused(kind: type[Section], context: dict[str, Any]) -> None:
    given = {path: value for path, value in defaults(kind).items() if path not in {*NEEDED, *context}}
    assert refused(kind, context) == []
    assert refused(kind, {**given, **context}) == []


@pytest.mark.parametrize(
    ("path", "value", "default", "context"),
    [
        ("output.hub_private", False, True, {}),
        ("training.sample_tokens", "65", "64", {}),
        ("training.adam_beta2", "0.95", "0.999", {"training.optimizer": "sgd"}),
        ("training.warmup_ratio", "0.1", "0.03", {"training.schedule": "constant"}),
        ("training.min_lr_ratio", "0.2", "0.1", {}),
        ("training.max_nan_skips", "3", "10", {}),
        ("quantization.compute_dtype", "bf16", "auto", {"quantization.method": "none"}),
        ("quantization.int8_threshold", "5", "6.0", {"quantization.method": "nf4"}),
        ("quantization.quant_storage", "bf16", "UINT8", {"quantization.method": "int8"}),
    ],
)
def test_a_setting_without_effect_is_refused_unless_it_is_the_default(
    path: str, value: object, default: object, context: dict[str, Any]
) -> None:
    assert refused(TrainSettings, {path: default, **context}) == []
    (problem,) = refused(TrainSettings, {path: value, **context})
    assert problem.startswith(f"{path}: ")


def test_the_default_split_of_a_local_file_asks_for_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    for split, is_refused in (("train", False), ("validation", True)):
        values = {**NEEDED, "data.dataset": str(rows), "data.split": split}
        flags = {
            path: (path, value) for path, value in values.items() if path.split(".")[0] in sections(TrainSettings)
        }
        resolved = resolve(Sources(flags=flags), TrainSettings)
        assert bool(data_problems(resolved, resolved.settings.data)) is is_refused


def test_the_contexts_make_something_idle() -> None:
    """Without this, the property above could hold vacuously."""
    idle = {"training.warmup_ratio": "0.2", "training.adam_beta2": "0.9", "training.longest_first": True}
    problems = list(itertools.chain.from_iterable(refused(TrainSettings, {**idle, **each}) for each in CONTEXTS))
    assert {line.split(": ")[0] for line in problems} == set(idle)
