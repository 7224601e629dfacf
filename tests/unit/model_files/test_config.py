"""Causal language models are recognised by the configs of the installed transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from transformers import AutoConfig

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.model_config import config_from, read_config
from qlora_cli.model_files.source import ModelSource
from tests.support.models.tiny_models import tiny_config


def source(path: Path, model_type: str, **values: object) -> ModelSource:
    """Return a directory that contains only a config.json."""
    config = AutoConfig.for_model(model_type).to_dict() | values
    (path / "config.json").write_text(json.dumps(config))
    return ModelSource(name="tiny", path=path, base_name="tiny", tokenizer_path=path)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "xlm-roberta", "bart", "mbart", "pegasus"])
def test_encoders_are_refused_although_transformers_has_a_causal_head_for_them(
    tmp_path: Path, model_type: str
) -> None:
    with pytest.raises(ModelError, match="is an encoder, or has one"):
        read_config(source(tmp_path, model_type), trust_remote_code=False)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt_neox_japanese", "llama", "mamba2", "opt", "xglm"])
def test_decoders_are_accepted(tmp_path: Path, model_type: str) -> None:
    assert read_config(source(tmp_path, model_type), trust_remote_code=False).config.model_type == model_type


def test_an_encoder_that_was_trained_as_a_decoder_is_accepted(tmp_path: Path) -> None:
    model_config = read_config(source(tmp_path, "bert", is_decoder=True), trust_remote_code=False)
    assert model_config.config.is_decoder


@pytest.mark.parametrize("model_type", ["t5", "whisper", "vit", "wav2vec2"])
def test_other_models_than_language_models_are_refused(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(ModelError, match=r"no causal language model for|is an encoder, or has one"):
        read_config(source(tmp_path, model_type), trust_remote_code=False)


def test_modules_of_a_vision_language_checkpoint_are_renamed_like_its_weights(tmp_path: Path) -> None:
    base = read_config(source(tmp_path, "gemma3"), trust_remote_code=False)
    assert base.renamed("model.language_model.layers.0.mlp") == "model.layers.0.mlp"
    assert base.renamed("language_model.model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert base.renamed("language_model.lm_head") == "lm_head"
    assert base.renamed("lm_head") == "lm_head"
    assert base.is_in_tower("vision_tower.layers.0.weight")
    assert not base.is_in_tower("language_model.model.norm.weight")


@pytest.mark.parametrize(
    ("model_type", "values", "named"),
    [
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: more than 2,000 are not built"),
        ("qwen3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: more than 2,000"),
        ("gpt2", {"n_layer": 10**6}, "n_layer is 1000000"),
        ("gemma3", {"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers is 1000000"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts is 1000000: more than 10,000 are not built"),
        ("mixtral", {"num_hidden_layers": 1000, "num_local_experts": 1000}, "more than 200,000 experts"),
    ],
    ids=str,
)
def test_too_many_layers_or_experts_are_refused_before_building(
    tmp_path: Path, model_type: str, values: dict[str, object], named: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **values}))
    began = monotonic()
    with pytest.raises(ModelError) as caught:
        read_config(
            ModelSource(name="tiny", path=tmp_path, base_name="tiny", tokenizer_path=tmp_path), trust_remote_code=False
        )
    assert monotonic() - began < 2
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'} describes no model that can be built: ")
    assert named in str(caught.value)


# A kernel of the hub, which is code; other files; the device.
CHOICES: dict[str, object] = {
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel@v1:function",
    "experts_implementation": "evil/kernel",
    "transformers_weights": "other.safetensors",
    "distributed_config": {"tp_size": 2},
    "fusion_config": {"x": 1},
}


@pytest.mark.parametrize("key", CHOICES)
@pytest.mark.parametrize("model_type", ["llama", "gemma3"])
def test_kernels_files_and_devices_in_a_config_are_ignored_with_a_note(
    tmp_path: Path, model_type: str, key: str
) -> None:
    content = {"model_type": model_type, key: CHOICES[key]}
    nested = {"text_config": {key: CHOICES[key]}} if model_type == "gemma3" else {}
    (tmp_path / "config.json").write_text(json.dumps({**content, **nested}))
    place = ModelSource(name="tiny", path=tmp_path, base_name="tiny", tokenizer_path=tmp_path)
    for model_config in (read_config(place, trust_remote_code=False), config_from("tiny", {**content, **nested})):
        assert (
            model_config.notes[0]
            == f"config.json: {key.removeprefix('_')} ignored: a config file does not choose this"
        )
        for name in (key, "_attn_implementation", "_experts_implementation"):
            assert getattr(model_config.config, name, None) is None


@pytest.mark.parametrize("value", ["x", "nan", "1.5", "", None, 5, [], {}, "-inf", {"__float__": "NaN"}])
@pytest.mark.parametrize("nest", [lambda value: value, lambda value: {"a": [1, value]}], ids=["plain", "nested"])
def test_an_invalid_named_float_is_reported_with_its_key(nest: Callable[[Any], Any], value: object) -> None:
    content = {**tiny_config("llama").to_dict(), "rope_theta": nest({"__float__": value})}
    with pytest.raises(ModelError, match=r"rope_theta is .*__float__ must be one of NaN, Infinity, -Infinity"):
        config_from("tiny", content)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_a_named_float_is_read(name: str) -> None:
    config = config_from("tiny", {**tiny_config("llama").to_dict(), "of_an_author": {"__float__": name}}).config
    assert str(config.of_an_author) == str(float(name))


@pytest.mark.parametrize("depth", [60, 300, 800, 950])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"a":', "}")])
def test_a_value_nested_too_deeply_is_named_by_its_key(tmp_path: Path, depth: int, ends: tuple[str, str]) -> None:
    nested = ends[0] * depth + "1" + ends[1] * depth
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "zz": {nested}}}')
    with pytest.raises(ModelError, match=r"zz is .*nested too deeply|can't be read as JSON: maximum recursion"):
        config_from(str(tmp_path), read_json(tmp_path / "config.json"))
