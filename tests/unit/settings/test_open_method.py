"""A method that is left open: it is provisional, what files say takes its place, and others need a name."""

import pytest

from qlora_cli.errors import SettingsError
from qlora_cli.settings.choices import METHODS, Quantization
from qlora_cli.settings.models import (
    ChatSettings,
    EvaluateSettings,
    InspectDataSettings,
    InspectMemorySettings,
    LoadCommandSettings,
    Section,
    TrainSettings,
)
from qlora_cli.settings.open_method import LEFT_OPEN, METHOD, is_method_open, with_provisional_method
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.settings.settle import InferredSettings, inferred_origin, settle

REQUIRED = {"model.name": "m", "data.dataset": "d", "output.directory": "o"}
FILE = inferred_origin("config.json")


def asked(kind: type[Section], **flags: str) -> Resolved[Section]:
    given = {"quantization.method": "auto", **{name.replace("__", "."): value for name, value in flags.items()}}
    values = {**{path: value for path, value in REQUIRED.items() if path.split(".")[0] in kind.model_fields}, **given}
    return resolve(Sources(flags={path: (f"--{path}", value) for path, value in values.items()}), kind)


def of_training(**flags: str) -> Resolved[TrainSettings]:
    return resolve(
        Sources(flags={path: (f"--{path}", value) for path, value in {**REQUIRED, **flags}.items()}), TrainSettings
    )


@pytest.mark.parametrize(
    ("init", "method"), [("default", Quantization.NF4), ("pissa", Quantization.NONE), ("loftq", Quantization.NF4)]
)
def test_the_provisional_method_takes_the_least_and_does_not_count_as_given(init: str, method: Quantization) -> None:
    opened = with_provisional_method(of_training(**{"quantization.method": "auto", "lora.init_lora_weights": init}))
    assert opened.settings.quantization.method == method
    assert opened.origin_of(METHOD) == LEFT_OPEN
    assert is_method_open(opened)
    assert not opened.is_given(METHOD)
    assert "method" not in opened.given("quantization")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_was_given_is_left_alone(method: Quantization) -> None:
    given = of_training(**{"quantization.method": method.value})
    assert with_provisional_method(given) is given
    assert not is_method_open(given)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_file_says_takes_the_place_of_the_provisional_method(method: Quantization) -> None:
    opened = with_provisional_method(of_training(**{"quantization.method": "auto"}))
    settled = settle(opened, [InferredSettings(values={METHOD: method}, origin=FILE)])
    assert settled.settings.quantization.method == method
    assert settled.origin_of(METHOD) == FILE  # also where it is the same
    assert not is_method_open(settled)


@pytest.mark.parametrize("kind", [LoadCommandSettings, ChatSettings, EvaluateSettings])
def test_a_command_that_trains_nothing_needs_a_method(kind: type[Section]) -> None:
    with pytest.raises(SettingsError) as caught:
        asked(kind)
    (problem,) = caught.value.problems
    assert problem.where == "--quantization.method"
    assert "nothing is trained here" in problem.message
    assert problem.hint == "Use --quant none or int8 or nf4."


@pytest.mark.parametrize("kind", [TrainSettings, InspectMemorySettings, InspectDataSettings])
def test_others_take_it(kind: type[Section]) -> None:
    assert asked(kind).settings.quantization.method == Quantization.AUTO  # type: ignore[attr-defined]


def test_a_setting_of_one_method_needs_that_method() -> None:
    with pytest.raises(SettingsError, match="int8_threshold has no effect with --quant auto"):
        asked(TrainSettings, quantization__int8_threshold="0")


def test_what_no_method_allows_is_refused() -> None:
    with pytest.raises(SettingsError, match="orthogonal needs even ranks"):
        asked(TrainSettings, lora__init_lora_weights="orthogonal", lora__rank="3")
