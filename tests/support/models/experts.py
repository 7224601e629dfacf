"""Tiny models with stacked experts, 256 wide, so that code tables of a kilobyte per weight do not dominate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.parametrize import ParametrizationList

from tests.support.models.loading import save_model
from tests.support.models.reference_models import ROWS

MOE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "deepseek_v3", "gpt_oss", "phimoe"),
    *("dbrx", "llama4_text", "nemotron_h"),
)
WIDTHS = {
    **{"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "head_dim": 64},
    **{"q_lora_rank": 64, "kv_lora_rank": 64},
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {
        "d_model": 256,
        "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 256},
    },
    "deepseek_v3": {**WIDTHS, "head_dim": 16},
    "nemotron_h": {**WIDTHS, "mamba_num_heads": 32},
    "phimoe": {**WIDTHS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},  # noise when training
}


def save_moe(directory: Path, family: str) -> Path:
    """Write a random model of a family with experts, in bf16, with a tokenizer."""
    return save_model(directory, family, vocab_size=ROWS, **CHANGES.get(family, WIDTHS))


def parametrized(model: torch.nn.Module) -> dict[str, ParametrizationList]:
    """Return the parametrization by which each quantized fused weight is stored, by the weight's name."""
    return {
        f"{path}.{name}": chain
        for path, module in model.named_modules()
        for name, chain in getattr(module, "parametrizations", {}).items()
    }
