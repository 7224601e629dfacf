"""Which architectures are causal language models, by the configs of the installed transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from qlora_cli.errors import ModelError
from qlora_cli.model_files.config import read_config
from qlora_cli.model_files.source import ModelSource


def source(path: Path, model_type: str, **values: object) -> ModelSource:
    """Return a directory that holds a config.json alone."""
    config = AutoConfig.for_model(model_type).to_dict() | values
    (path / "config.json").write_text(json.dumps(config))
    return ModelSource(name="tiny", path=path, base_name="tiny", tokenizer_path=path)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "xlm-roberta", "bart", "mbart", "pegasus"])
def test_encoders_are_refused_though_transformers_has_a_causal_head_for_them(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(ModelError, match="is an encoder, or has one"):
        read_config(source(tmp_path, model_type), trust_remote_code=False)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt_neox_japanese", "llama", "mamba2", "opt", "xglm"])
def test_decoders_are_not(tmp_path: Path, model_type: str) -> None:
    assert read_config(source(tmp_path, model_type), trust_remote_code=False).config.model_type == model_type


def test_an_encoder_that_was_trained_as_a_decoder_is_one(tmp_path: Path) -> None:
    found = read_config(source(tmp_path, "bert", is_decoder=True), trust_remote_code=False)
    assert found.config.is_decoder


@pytest.mark.parametrize("model_type", ["t5", "whisper", "vit", "wav2vec2"])
def test_what_is_no_language_model_is_refused(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(ModelError, match=r"no causal language model for|is an encoder, or has one"):
        read_config(source(tmp_path, model_type), trust_remote_code=False)


def test_modules_of_a_vision_language_checkpoint_are_renamed_as_its_weights_are(tmp_path: Path) -> None:
    base = read_config(source(tmp_path, "gemma3"), trust_remote_code=False)
    assert base.renamed("model.language_model.layers.0.mlp") == "model.layers.0.mlp"
    assert base.renamed("language_model.model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert base.renamed("language_model.lm_head") == "lm_head"
    assert base.renamed("lm_head") == "lm_head"
    assert base.is_left_out("vision_tower.layers.0.weight")
    assert not base.is_left_out("language_model.model.norm.weight")
