"""Tiny vision-language models: the text decoders that `qlora load` extracts, together with their towers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tests.support.models.loading import copy_tokenizer
from tests.support.models.reference_models import ROWS
from tests.support.models.tiny_models import COMMON, EXPERTS, LINEAR_ATTENTION

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
SIGLIP = {**SIZES, "model_type": "siglip_vision_model", "num_hidden_layers": 1}
CLIP = {**SIZES, "model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 32}
QWEN_VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "patch_size": 14},
    **{"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}
MULTI_PART_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _text(model_type: str, **values: Any) -> dict[str, Any]:
    return {**COMMON, "vocab_size": ROWS, "eos_token_id": 4, "model_type": model_type, **values}


FULL_MODELS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "text_config": _text("gemma3_text", sliding_window=32, query_pre_attn_scalar=16),
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": _text("gemma4_text", sliding_window=32, hidden_size_per_layer_input=0, global_head_dim=16),
        "vision_config": {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16},
        "audio_config": None,
    },
    "qwen2_vl": {
        "text_config": _text("qwen2_vl_text", rope_parameters=MULTI_PART_ROPE),
        "vision_config": {**QWEN_VISION, "hidden_size": 64, "embed_dim": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": _text("qwen2_5_vl_text", rope_parameters=MULTI_PART_ROPE),
        "vision_config": QWEN_VISION,
    },
    "qwen3_vl": {
        "text_config": _text("qwen3_vl_text", rope_parameters=MULTI_PART_ROPE),
        "vision_config": QWEN_VISION,
    },
    "qwen3_vl_moe": {
        "text_config": _text("qwen3_vl_moe_text", rope_parameters=MULTI_PART_ROPE, **EXPERTS),
        "vision_config": QWEN_VISION,
    },
    "qwen3_5": {
        "text_config": _text(
            "qwen3_5_text", rope_parameters={**MULTI_PART_ROPE, "partial_rotary_factor": 1.0}, **LINEAR_ATTENTION
        ),
        "vision_config": QWEN_VISION,
    },
    "mistral3": {
        "text_config": _text("mistral"),
        "vision_config": {**SIZES, "model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 16},
    },
    "llava": {"text_config": _text("llama"), "vision_config": CLIP},
    "llava_onevision": {"text_config": _text("qwen2"), "vision_config": SIGLIP},
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": {**SIZES, "num_hidden_layers": 1, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "idefics3": {"text_config": _text("llama"), "vision_config": {**SIZES, "num_hidden_layers": 1}},
    "smolvlm": {"text_config": _text("llama"), "vision_config": {**SIZES, "num_hidden_layers": 1}},
    "llama4": {
        "text_config": _text("llama4_text", num_local_experts=2, intermediate_size_mlp=128, intermediate_size=64),
        "vision_config": {
            **{**SIZES, "model_type": "llama4_vision_model", "num_hidden_layers": 1, "intermediate_size": 128},
            **{"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        },
    },
}


def full_class(family: str) -> Any:
    """Return the class of the whole model, including its towers."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(AutoConfig.for_model(family))]


def save_full(directory: Path, family: str) -> Path:
    """Write a random model in bf16 as `save_pretrained` does, with the bundled tokenizer."""
    torch.manual_seed(0)
    model = full_class(family)(AutoConfig.for_model(family, **FULL_MODELS[family]))
    for parameter in model.parameters():  # not the buffers, of which some are complex
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(directory)
    return copy_tokenizer(directory)


def load_full(directory: Path, family: str) -> PreTrainedModel:
    """Return the whole model by plain transformers, in fp32."""
    model: PreTrainedModel = full_class(family).from_pretrained(directory, dtype=torch.float32)
    return model


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Change the stored weights."""
    file = directory / "model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    return directory
