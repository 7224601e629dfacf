"""Read a model's config.json, and choose the decoder that is built from it: always the text decoder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import check_small_files, read_json
from qlora_cli.model_files.construction import (
    METADATA_KEYS,
    build_config,
    check_bounds,
    check_dtypes,
    check_sizes,
    check_values,
    drop_choices,
    faulty_keys,
    is_ours,
    refused,
    text_config,
)
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.source import ModelSource

# Decoders of vision-language models that differ from a plain one only in the positions of images: for text, the
# multi-part rotary positions are the ordinary ones. With the additional keys that the plain decoder needs.
PLAIN_DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),  # hard-coded there, a setting here
}
# Where the text decoder is in a checkpoint with towers, as different versions of transformers wrote it.
DECODER_NAMES: Mapping[str, str] = {
    r"^(model\.)?language_model\.model\.": "model.",
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^model\.(language|text)_model\.": "model.",
}
# Their configs say `is_decoder: false`, like those of encoders, for which transformers has a causal head too.
MISLABELED_DECODERS = ("gpt_neox", "gpt_neox_japanese")
TOWERS = ("vision", "visual", "audio", "image", "projector", "connector", "merger", "speech", "embed_vision")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The config that a model is built from. `key_mapping` renames the weights of a text decoder."""

    config: PreTrainedConfig
    key_mapping: Mapping[str, str] | None
    notes: tuple[str, ...] = ()

    @property
    def text_only(self) -> bool:
        """Whether only the text decoder of a checkpoint with towers is loaded."""
        return self.key_mapping is not None

    def renamed(self, name: str) -> str:
        """Return the name that the module `name` of the checkpoint has in the model."""
        for pattern, replacement in (self.key_mapping or {}).items():
            if re.match(pattern, f"{name}."):
                return re.sub(pattern, replacement, f"{name}.").removesuffix(".")
        return name

    def is_in_tower(self, weight: str) -> bool:
        """Return whether a weight of the checkpoint belongs to a tower that is not loaded."""
        return self.text_only and any(tower in weight for tower in TOWERS)


def read_config(source: ModelSource, *, trust_remote_code: bool) -> ModelConfig:
    """Return the config to build the model from.

    Raises:
        ModelError: it can't be read, needs code of its own, or is no text decoder that transformers has.
    """
    check_small_files(source.path)
    content = read_json(source.path / CONFIG)
    check_bounds(str(source.path), content)
    check_dtypes(str(source.path), content)
    check_values(str(source.path), content)
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the code of an architecture raises
        raise _unreadable(source.name, str(source.path), content, error) from error
    dropped = drop_choices(config, content)
    if trust_remote_code and getattr(config, "auto_map", None):
        return ModelConfig(config=config, key_mapping=None, notes=dropped)
    return _decoder_config(source.name, str(source.path), content, config, dropped)


def config_from(name: str, content: Mapping[str, Any]) -> ModelConfig:
    """Return the config to build the model `name` from, given the content of its config.json.

    Raises:
        ModelError: it can't be read, needs code of its own, or is no text decoder that transformers has.
    """
    model_type = content.get("model_type")
    if "auto_map" in content and model_type not in CONFIG_MAPPING:
        raise _custom_code_error(name)
    check_bounds(name, content)
    check_dtypes(name, content)
    check_values(name, content)
    try:
        config = build_config(content)
    except Exception as error:  # whatever the code of an architecture raises
        raise _unreadable(name, name, content, error) from error
    config.name_or_path = name
    return _decoder_config(name, name, content, config, drop_choices(config, content))


def quantization_config_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization config in a `config.json`; None if it has none."""
    text_config = config.get("text_config")
    parts = [config, text_config] if isinstance(text_config, Mapping) else [config]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(value := part.get(key), Mapping) and value:
                return value
    return None


def balances_experts(config: PreTrainedConfig) -> bool:
    """Return whether the loss of a model has a part that balances experts, which is a mean over a micro-batch."""
    return bool(getattr(config.get_text_config(), "router_aux_loss_coef", 0))


def _decoder_config(
    name: str, where: str, content: Mapping[str, Any], config: PreTrainedConfig, notes: tuple[str, ...]
) -> ModelConfig:
    """Return the config of the text decoder of `config`, which the `content` of `where` describes."""
    try:
        text = text_config(config)
    except Exception as error:  # whatever the code of an architecture raises
        raise _unreadable(name, where, content, error) from error
    check_sizes(where, text)
    if text is config:
        _check_class(name, config)
        return ModelConfig(config=config, key_mapping=None, notes=notes)
    text = _plain_decoder(text)
    text.name_or_path = config.name_or_path
    _check_class(name, text)
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # the value of the whole model applies
    note = f"{config.model_type} takes more than text; only its text decoder ({text.model_type}) is loaded"
    return ModelConfig(config=text, key_mapping=DECODER_NAMES, notes=(*notes, note))


def _plain_decoder(text: PreTrainedConfig) -> PreTrainedConfig:
    if text.model_type not in PLAIN_DECODERS:
        return text
    values: dict[str, Any] = text.to_dict()
    values.pop("model_type")
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        values["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    model_type, extra = PLAIN_DECODERS[text.model_type]
    return AutoConfig.for_model(model_type, **{**values, **extra})


def _check_class(name: str, config: PreTrainedConfig) -> None:
    is_bidirectional = getattr(config, "is_decoder", True) is False and config.model_type not in MISLABELED_DECODERS
    if is_bidirectional or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} can't be loaded: {config.model_type!r} is an encoder, or has one: each token sees those "
            "after it, so it can't be trained to continue a text",
            hint="Take a causal language model (a decoder).",
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{name} can't be loaded: transformers has no causal language model for {config.model_type!r}",
            hint="Take a causal language model (a decoder); others are not fine-tuned here.",
        )


def _unreadable(name: str, where: str, content: Mapping[str, Any], error: Exception) -> Exception:
    """Return the exception to raise for transformers' `error` over the `content` of a config.json."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        return refused(where, content, ["model_type"], "it must name the architecture")
    if is_ours(error):
        return error
    if "trust_remote_code" in str(error):
        return _custom_code_error(name)
    if model_type not in CONFIG_MAPPING and "auto_map" not in content:
        return ModelError(
            f"{name} can't be loaded: the installed transformers knows no architecture {model_type!r}",
            hint="A newer transformers may know it: pip install -U transformers",
        )
    keys = faulty_keys(content, [key for key in content if key not in METADATA_KEYS], error, build_config)
    return refused(where, content, keys, error)


def _custom_code_error(name: str) -> ModelError:
    return ModelError(
        f"{name} can't be loaded: it comes with its own Python code, which is not run by default",
        hint="Read the code; if you trust its author, give --trust-remote-code.",
    )
