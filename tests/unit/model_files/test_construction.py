"""A config.json that an architecture refuses: one error that names file, key and value, whatever its code raises."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.memory.catalogue import catalogue
from qlora_cli.model_files.construction import (
    MOST_SECONDS,
    MOST_TRIED,
    build_model,
    faulty_keys,
    is_ours,
    shown,
    text_config,
)
from qlora_cli.model_files.model_config import config_from, read_config
from qlora_cli.model_files.source import ModelSource
from qlora_cli.quantization.storage_plan import build_on_meta
from tests.support.models.tiny_models import FAMILIES, VOCABULARY_SIZE, tiny_config

BROKEN: Mapping[str, Any] = {
    "pad_token_id": VOCABULARY_SIZE,
    "rope_parameters": {"rope_type": "ntk-aware", "factor": 2.0, "rope_theta": 1e4},
    "hidden_act": "nonsense",
    "activation_function": "nonsense",
    "vocab_size": "128",
    "hidden_size": -64,
    "num_hidden_layers": 0,
    "num_attention_heads": 0,
    "num_key_value_heads": 3,
    "layer_types": ["full_attention"],
    "dtype": "float99",
    "quantization_config": "nf4",
    "text_config": 5,
    "max_position_embeddings": "many",
    "num_experts_per_tok": 99,
}
KINDS = ("llama", "gpt2", "bloom", "phi3", "mixtral", "gemma3_text", "deepseek_v3", "falcon", "mamba2", "nemotron_h")
ALWAYS_REFUSED = ("vocab_size", "dtype", "quantization_config", "text_config")


def write(directory: Path, content: Mapping[str, Any]) -> ModelSource:
    (directory / "config.json").write_text(json.dumps(content))
    return ModelSource(name="tiny", path=directory, base_name="tiny", tokenizer_path=directory)


def content_of(family: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(tiny_config(family).to_json_string())
    return {**values, **changes}


def built(source: ModelSource) -> PreTrainedModel:
    return build_on_meta(read_config(source, trust_remote_code=False).config, torch.bfloat16)


def names_of(family: str, key: str) -> set[str]:
    return {key, tiny_config(family).attribute_map.get(key, key)}


def refusal(source: ModelSource) -> ModelError | None:
    """Return the error of building a model; any other exception fails the test."""
    try:
        built(source)
    except ModelError as error:
        return error
    return None


@pytest.mark.parametrize("family", KINDS)
def test_a_config_that_an_architecture_refuses_is_an_error_that_names_file_and_key(
    family: str, tmp_path: Path
) -> None:
    refused = set()
    for key, value in BROKEN.items():
        error = refusal(write(tmp_path, content_of(family, **{key: value})))
        if error is None:  # this architecture does not use the key
            continue
        refused.add(key)
        assert str(tmp_path / "config.json") in error.message
        assert "config.json" in str(error.hint)
        assert any(name in error.message for name in names_of(family, key)), error.message
        assert "\n" not in error.message
        assert len(error.message) < 1000
    assert refused >= set(ALWAYS_REFUSED)
    assert len(refused) >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_valid_config_builds_the_same_model_from_its_file_and_its_content(family: str, tmp_path: Path) -> None:
    source = write(tmp_path, content_of(family))
    from_content = build_on_meta(config_from("tiny", content_of(family)).config, torch.bfloat16)
    shapes = {name: parameter.shape for name, parameter in built(source).named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in from_content.named_parameters()}


def test_no_model_of_the_catalogue_has_a_size_that_is_refused() -> None:
    assert len([config_from(model.name, model.config) for model in catalogue()]) > 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 128}, "pad_token_id is 128: AssertionError: Padding_idx must be within num_embeddings"),
        ({"rope_parameters": BROKEN["rope_parameters"]}, '"rope_type": "ntk-aware"'),
        ({"vocab_size": "128"}, 'vocab_size is "128": it must be int'),
        ({"dtype": "float99"}, 'dtype is "float99"'),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, num_key_value_heads is 3: the first must be a mult"),
    ],
)
def test_only_the_wrong_key_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        built(write(tmp_path, content_of("llama", **changes)))
    assert message in caught.value.message
    assert caught.value.message.count(" is ") <= 2


def without(*keys: str) -> Any:
    """Return a builder that fails on a value under any of `keys`, and the contents that it was called with."""
    given: list[Mapping[str, Any]] = []

    def builds(content: Mapping[str, Any]) -> None:
        given.append(content)
        if any(content.get(key) is not None for key in keys):
            raise ValueError("it can't be")

    return builds, given


@pytest.mark.parametrize("message", ["it can't be", "key_2 can't be"])
def test_no_key_is_blamed_for_a_config_that_builds(message: str) -> None:
    builds, given = without()
    assert faulty_keys({"key_1": 1, "key_2": 2}, ["key_1", "key_2"], ValueError(message), builds) == []
    assert len(given) == 1


@pytest.mark.parametrize("number", [0, MOST_TRIED - 1, MOST_TRIED, 1000])
def test_a_limited_number_of_keys_is_tried_and_first_those_that_the_error_names(number: int) -> None:
    content = {f"key_{index}": "value" for index in range(2000)}
    builds, given = without(f"key_{number}")
    faulty = faulty_keys(content, content, ValueError("it can't be"), builds)
    assert faulty == ([f"key_{number}"] if number < MOST_TRIED else [])
    assert len(given) <= 1 + 2 * MOST_TRIED
    assert faulty_keys(content, content, ValueError(f"key_{number} can't be"), builds) == [f"key_{number}"]


def test_the_search_for_a_key_is_limited_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10_000, 5))  # each build takes 5
    monkeypatch.setattr("qlora_cli.model_files.construction.monotonic", lambda: next(seconds))
    content = {f"key_{index}": "value" for index in range(60)}
    builds, given = without("key_50")
    assert faulty_keys(content, content, ValueError("it can't be"), builds) == []
    assert 1 < len(given) <= 1 + 2 * MOST_SECONDS / 5


def test_a_key_has_the_name_that_the_file_uses(tmp_path: Path) -> None:
    content = content_of("llama", rope_scaling={"type": "ntk-aware", "factor": 2.0}, torch_dtype="bfloat16")
    content.pop("rope_parameters")
    with pytest.raises(ModelError, match=r"rope_scaling is \{"):
        built(write(tmp_path, content))


def test_an_error_in_the_text_config_of_a_multimodal_checkpoint_names_the_file(tmp_path: Path) -> None:
    text = content_of("gemma3_text", pad_token_id=128)
    source = write(tmp_path, {"model_type": "gemma3", "text_config": text})
    with pytest.raises(ModelError, match="pad_token_id is 128") as caught:
        built(source)
    assert str(tmp_path / "config.json") in caught.value.message


def test_a_config_without_a_file_is_named_by_its_model() -> None:
    with pytest.raises(ModelError, match=r"^config\.json of some/model .*pad_token_id is 128"):
        build_on_meta(config_from("some/model", content_of("llama", pad_token_id=128)).config, torch.bfloat16)


def test_an_exception_of_our_own_code_is_not_blamed_on_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from code of this package that a constructor calls passes through unchanged."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda *_: text_config("no config"))  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="get_text_config") as caught:
        build_model(tiny_config("llama"), torch.bfloat16)
    assert is_ours(caught.value)


@pytest.mark.parametrize("error", ["RuntimeError", "ZeroDivisionError", "AssertionError"])
def test_any_exception_of_code_that_comes_with_a_model_is_reported(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    raising = f"    def __post_init__(self, **_):\n        raise {error}('{error} of theirs')\n"
    code = f"from transformers import LlamaConfig\n\nclass Own(LlamaConfig):\n{raising}"
    (tmp_path / f"own_{error.lower()}.py").write_text(code)
    auto_map = {"AutoConfig": f"own_{error.lower()}.Own"}
    source = write(tmp_path, {**content_of("llama"), "model_type": "own", "auto_map": auto_map})
    with pytest.raises(ModelError, match=f"{error} of theirs") as caught:
        read_config(source, trust_remote_code=True)
    assert str(tmp_path / "config.json") in caught.value.message


@pytest.mark.parametrize("wrong", ["bfloat17", "auto", "Tensor", "nn", "torch.bfloat16", 5, True, [], "\ud800"])
def test_an_unknown_dtype_is_an_error_that_names_every_key_it_is_under(tmp_path: Path, wrong: object) -> None:
    keys = ("torch_dtype", "dtype")
    for values in ({"dtype": wrong}, {"torch_dtype": wrong}, {"torch_dtype": wrong, "dtype": wrong}):
        for right in ({}, dict.fromkeys(keys, "bfloat16")):
            content = {**{k: v for k, v in content_of("llama").items() if k not in keys}, **right, **values}
            faulty = [key for key in keys if key in values]
            named = ", ".join(f"{key} is {shown(wrong)}" for key in faulty)
            with pytest.raises(ModelError) as caught:
                read_config(write(tmp_path, content), trust_remote_code=False)
            assert str(tmp_path / "config.json") in str(caught.value)
            with pytest.raises(ModelError) as of_content:
                config_from("x", content)
            assert caught.value.message.endswith(f": {named}: torch has no such dtype")
            assert of_content.value.message.endswith(f": {named}: torch has no such dtype")


@pytest.mark.parametrize("right", [{}, {"dtype": None}, {"dtype": "float16"}, {"torch_dtype": "float16"}])
def test_a_known_dtype_is_accepted_under_either_key(right: Mapping[str, Any]) -> None:
    content = {key: value for key, value in content_of("llama").items() if "dtype" not in key}
    assert config_from("x", {**content, **right}).config.dtype in {None, torch.float16}
