"""The config of an adapter: LoRA, named by its type, with values of the types that PEFT accepts."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_cli.adapters.reader import attach
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import (
    ADAPTER_CONFIG,
    USED_KEYS,
    AdapterConfig,
    notes_on_ignored_keys,
    read_adapter_config,
)
from qlora_cli.model_files.adapter_variants import INITIALIZATIONS
from qlora_cli.model_files.given_model import check_model_name
from qlora_cli.settings.models import ModelSettings

GOOD = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
WRONG_TYPES: dict[str, list[object]] = {
    "r": [4.0, "4", True, 0, -1, None],
    "lora_alpha": ["16", None, [1], float("nan")],
    "lora_dropout": ["0", -0.1, 1.0],
    "target_modules": [5, [5], {"q_proj": 1}, "(q_proj"],
    "target_parameters": ["experts", 5],
    "exclude_modules": [5, [None], "*"],
    "layers_pattern": [["["], "[", "(?P<idx>a)"],
    "layer_replication": [5, [[0]], [["0", 1]]],
    "layers_to_transform": ["1", [1.5]],
    "rank_pattern": [[], {"q_proj": 4.5}, {"q_proj": 0}, {"q_proj[": 4}, {"(?i)q_proj": 4}],
    "alpha_pattern": ["x", {"q_proj": "8"}, {"(": 8}],
    "modules_to_save": ["lm_head", 5, ["("], ["lm_head", "(("], ["["]],
    "trainable_token_indices": [5, ["a"], {"embed_tokens": 5}],
    "bias": ["some", 5],
    "init_lora_weights": [5, "pissa_niter_99999999", "pissa_niter_65", "pissa_niter_", "pissa_niter_٣", "olora2", ""],
    "task_type": [["CAUSAL_LM"]],
    "peft_version": [0.1],
    "inference_mode": ["x"],
    "ensure_weight_tying": [1],
    "use_qalora": ["x"],
    "qalora_group_size": [0, -1, "16", 10**30],
    "use_bdlora": [True, {"nblocks": 0}, {"nblocks": 10**9}, {"target_modules_bd_a": "q_proj"}],
    "arrow_config": [True],
    "kasa_config": [True, {"beta": float("nan")}, {"gamma": "x"}],
    "velora_config": [True, {"num_groups": 0}, {"scale": float("inf")}, {"init_type": "x"}],
    "monteclora_config": [True, {"num_samples": 10**9}, {"buffer_size": 10**9}, {"dirichlet_prior": 0.0}],
    "alora_invocation_tokens": [["x"], [-1], [1.5], 5, "x", [[1]], [True]],
    "use_dora": ["yes", 1],
    "use_rslora": ["yes"],
    "fan_in_fan_out": [0],
    "lora_bias": ["no"],
    "base_model_name_or_path": [5],
    "revision": [5],
}


def write(directory: Path, content: object) -> Path:
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return directory


def message_of(directory: Path, content: object) -> str:
    """Return the message; the preflight check, which imports no torch, says the same."""
    write(directory, content)
    with pytest.raises(ModelError) as caught:
        read_adapter_config(directory)
    problem = check_model_name(ModelSettings(name=str(directory)))
    assert str(problem) == str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values], ids=str
)
def test_a_value_of_another_type_is_named_with_its_key_and_file(tmp_path: Path, key: str, value: object) -> None:
    message = message_of(tmp_path, {**GOOD, key: value})
    assert message.startswith(f"{tmp_path / ADAPTER_CONFIG} can't be used: {key} is {value!r}, and should be ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("kind", ["ADALORA", "IA3", "PROMPT_TUNING", "of a later version", 5])
def test_an_adapter_of_another_type_is_refused_by_name(tmp_path: Path, kind: object) -> None:
    assert f"is {kind}, not LoRA" in message_of(tmp_path, {**GOOD, "peft_type": kind})


def test_a_config_without_its_type_says_so(tmp_path: Path) -> None:
    assert "has no peft_type" in message_of(tmp_path, {key: GOOD[key] for key in GOOD if key != "peft_type"})


@pytest.mark.parametrize("content", [[], 5, None, "LORA"])
def test_a_config_that_is_not_an_object_is_refused(tmp_path: Path, content: object) -> None:
    assert "holds no JSON object" in message_of(tmp_path, content)


def test_null_equals_a_missing_key(tmp_path: Path) -> None:
    nulls = dict.fromkeys(WRONG_TYPES.keys() - GOOD.keys())
    config = read_adapter_config(write(tmp_path, {**GOOD, **nulls, "of_a_later_version": {"a": 1}}))
    again = read_adapter_config(write(tmp_path, {**GOOD, "of_a_later_version": {"a": 1}}))
    assert config.model_dump(exclude={"content"}) == again.model_dump(exclude={"content"})
    assert config.non_null == again.non_null == again.content
    assert config.non_null["of_a_later_version"] == {"a": 1}


def test_a_long_value_is_truncated_in_the_message(tmp_path: Path) -> None:
    assert len(message_of(tmp_path, {**GOOD, "bias": "x" * 30_000})) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("target_modules", "a" * 20_000, "a pattern of at most 10,000 characters"),
        ("target_modules", "(" * 5_000 + ")" * 5_000, "a regular expression"),
        ("exclude_modules", "a{99999999999}", "a regular expression"),
        ("target_modules", [f"layer_{number}" for number in range(10_001)], "at most 10,000 names"),
        ("rank_pattern", {f"layer_{number}": 4 for number in range(2_001)}, "at most 2,000 patterns"),
        ("rank_pattern", {f"{number:04}" + "(a|b)" * 15: 4 for number in range(2_000)}, "at most 100,000 characters"),
        ("modules_to_save", ["(" * 5_000], "a regular expression"),
        ("alora_invocation_tokens", list(range(1_001)), "at most 1000 items"),
        ("layer_replication", [[0, 2]] * 1_001, "ranges of at most 2,000 layers in all"),
        ("layer_replication", [[0, 10**30]], "ranges of at most 2,000 layers in all"),
    ],
    ids=["long", "deep", "large", "names", "patterns", "all patterns", "deep module", "tokens", "ranges", "range"],
)
def test_values_that_take_too_long_to_match_or_to_apply_are_refused_when_read(
    tmp_path: Path, key: str, value: object, wanted: str
) -> None:
    message = message_of(tmp_path, {**GOOD, key: value})
    assert f"{key} is " in message or "its patterns have " in message
    assert wanted in message
    assert len(message) < 1_000


# Modules that PEFT would import, devices, and keys that no PEFT knows.
IGNORED = {"megatron_config": {"x": 1}, "runtime_config": {"ephemeral_gpu_offload": True}, "from_elsewhere": 5}


def test_only_listed_keys_of_an_adapter_are_used_and_the_rest_is_noted(tmp_path: Path) -> None:
    content = {**GOOD, **IGNORED, "megatron_core": "megatron.core", "auto_mapping": None}
    config = read_adapter_config(write(tmp_path, content))
    assert config.used == GOOD
    assert config.content == content  # as it is saved
    (note,) = notes_on_ignored_keys([None, tmp_path])
    assert note.startswith(f"{tmp_path / ADAPTER_CONFIG}: from_elsewhere, megatron_config, runtime_config ignored: ")


def test_every_key_of_peft_is_listed_or_ignored_on_purpose() -> None:
    of_a_beginning = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    on_purpose = {"auto_mapping", "megatron_config", "megatron_core", "runtime_config", *of_a_beginning}
    assert {one.name for one in fields(LoraConfig)} - USED_KEYS == on_purpose


def test_every_used_key_has_a_type_and_a_test() -> None:
    assert AdapterConfig.model_fields.keys() >= USED_KEYS
    assert USED_KEYS - {"peft_type"} == WRONG_TYPES.keys()


@pytest.mark.parametrize("init", [*INITIALIZATIONS, "GAUSSIAN", "Olora", True, False])
def test_every_initialization_of_peft_is_known(tmp_path: Path, init: object) -> None:
    assert read_adapter_config(write(tmp_path, {**GOOD, "init_lora_weights": init})).init_lora_weights == init


def test_initializations_equal_those_that_peft_documents() -> None:
    documented = re.search(r"init_lora_weights \(`bool` \| `Literal\[(.*?)\]`\)", str(LoraConfig.__doc__), re.DOTALL)
    assert documented is not None
    names = set(re.findall(r'"(\w+)"', documented[1]))
    assert names >= {"gaussian", "pissa", "olora"}
    assert names <= set(INITIALIZATIONS)


def test_empty_invocation_tokens_are_omitted(tmp_path: Path) -> None:
    config = read_adapter_config(write(tmp_path, {**GOOD, "alora_invocation_tokens": []}))
    assert "alora_invocation_tokens" not in config.used


def test_a_config_written_by_peft_has_no_notes(tmp_path: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="base").save_pretrained(tmp_path)
    assert list(notes_on_ignored_keys([tmp_path])) == []


def test_layer_replication_is_limited(tmp_path: Path) -> None:
    size = LlamaConfig(num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=8)
    with torch.device("meta"):
        base = LlamaForCausalLM(size)
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2)] * 900)
    with pytest.raises(ModelError, match="layer_replication makes 1,800 layers, and the base has 2; at most 4"):
        attach(base, config, tmp_path)
    config.layer_replication = [(0, 2), (1, 2), (0, 2)]
    assert attach(base, config, tmp_path).config.num_hidden_layers == 5
