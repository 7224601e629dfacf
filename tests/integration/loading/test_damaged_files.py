"""Damaged small files of a model: one message that names file and key, and exit code 2, in every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qlora_cli.errors import ModelError
from tests.conftest import RunQlora
from tests.support.models.adapters import PREFIX
from tests.support.models.loading import copy_tokenizer, load, refused, save_model

GENERATION, TOKENIZER, INDEX = "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def sharded(model: Path, tmp_path: Path) -> Path:
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return copy_tokenizer(tmp_path / "sharded")


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (GENERATION, "eos_token_id", "x"),
        (GENERATION, "eos_token_id", [1, "x"]),
        (GENERATION, "temperature", "hot"),
        (GENERATION, "max_length", "long"),
        (GENERATION, "cache_implementation", "nonsense"),
        (GENERATION, "watermarking_config", 5),
        (GENERATION, "compile_config", 5),
        (TOKENIZER, "eos_token", 5),
        (TOKENIZER, "pad_token", {"content": 5}),
        (TOKENIZER, "tokenizer_class", 5),
        (TOKENIZER, "added_tokens_decoder", {"x": {}}),
        (TOKENIZER, "additional_special_tokens", 5),
        (TOKENIZER, "padding_side", "middle"),
        (TOKENIZER, "auto_map", 5),
        ("added_tokens.json", "<new>", "b"),
        ("special_tokens_map.json", "eos_token", 5),
    ],
)
def test_an_invalid_value_is_named_with_its_file_and_key(model: Path, file: str, key: str, value: Any) -> None:
    change(model / file, **{key: value})
    message = refused(model, ModelError)
    assert f"{model / file} is not a valid " in message
    assert f"{key} is {json.dumps(value)}" in message
    assert f"Copy {file} again" in message


@pytest.mark.parametrize("value", [5, [5], [{"name": "default"}], {"default": 5}])
@pytest.mark.parametrize("file", [TOKENIZER, "chat_template.json"])
def test_a_chat_template_that_is_not_a_string_is_named(model: Path, file: str, value: Any) -> None:
    (model / "chat_template.jinja").unlink()
    change(model / file, chat_template=value)
    message = refused(model, ModelError)
    assert str(model / file) in message
    assert "chat_template is " in message


def test_generation_flags_without_an_effect_together_are_kept_without_a_warning(
    run_qlora: RunQlora, model: Path, tmp_path: Path
) -> None:
    """Many published models have them; transformers warns about them and refuses to write them."""
    change(model / GENERATION, temperature=0.6, top_p=0.9)
    done = run_qlora("load", str(model), "--save", str(tmp_path / "saved"))
    assert done.code == 0, done.stderr
    assert "generation flags" not in done.stderr
    assert json.loads((tmp_path / "saved" / GENERATION).read_text())["temperature"] == 0.6


def without_metadata(content: dict[str, Any]) -> dict[str, Any]:
    return {"weight_map": content["weight_map"]}


def in_file(name: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, "weight_map": {**content["weight_map"], "lm_head.weight": name}}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_metadata, "metadata is not an object"),
        (lambda content: {**content, "metadata": None}, "metadata is not an object"),
        (lambda content: {**content, "metadata": "x"}, "metadata is not an object"),
        (lambda content: {"metadata": content["metadata"]}, "has no weight_map"),
        (lambda content: {**content, "weight_map": ["a"]}, "has no weight_map"),
        (in_file(5), "the tensor lm_head.weight is in 5, which is no file of that directory"),
        (in_file("../model.safetensors"), "is in '../model.safetensors', which is no file of that directory"),
        (in_file("."), "the tensor lm_head.weight is in '.', which is no .safetensors file"),
        (in_file("config.json"), "is in 'config.json', which is no .safetensors file"),
    ],
)
def test_a_damaged_index_is_named(
    sharded: Path, damage: Callable[[dict[str, Any]], dict[str, Any]], expected: str
) -> None:
    load(sharded)
    index = sharded / INDEX
    index.write_text(json.dumps(damage(json.loads(index.read_text()))))
    message = refused(sharded, ModelError)
    assert str(index) in message
    assert expected in message


@pytest.mark.parametrize(
    ("file", "values", "commands"),
    [
        (
            "config.json",
            {"pad_token_id": 99_999},
            ("merge", "inspect-memory", "evaluate", "train"),
        ),
        (GENERATION, {"eos_token_id": "x"}, ("generate",)),
        (TOKENIZER, {"eos_token": 5}, ("inspect-data",)),
    ],
)
def test_every_command_refuses_it_and_leaves_no_files(
    run_qlora: RunQlora, model: Path, rows: Path, tmp_path: Path, file: str, values: dict[str, Any], commands: Any
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    change(
        adapter / "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(model),
        target_modules=["q_proj"],
    )
    q_proj = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{q_proj}A.weight": torch.zeros(8, 64), f"{q_proj}B.weight": torch.zeros(64, 8)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    change(model / file, **values)
    output = tmp_path / "output"
    arguments: dict[str, list[Any]] = {
        "inspect-memory": [model],
        "generate": [model, "--prompt", "hi"],
        "evaluate": [model, "--dataset", rows],
        "train": ["--model", model, "--dataset", rows, "--output", output],
        "merge": [adapter, "--output", output],
        "inspect-data": ["--model", model, "--dataset", rows],
    }
    (key,) = values
    for command in commands:
        done = run_qlora(command, *arguments[command])
        assert done.code == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert str(model / file) in done.stderr
        assert f"{key} is {json.dumps(values[key])}" in done.stderr
        assert not output.exists()
