"""Tiny random models of many architectures: each a config with small numbers, saved as users' models are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY_SIZE = 128

# Names that nearly all decoders share. Widths are multiples of 64, the block size of NF4.
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
# A first layer without experts, and routing by groups.
DENSE_FIRST: Mapping[str, Any] = {
    **EXPERTS,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT_ATTENTION: Mapping[str, Any] = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SSM: Mapping[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "head_dim": None},
    "olmo": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "cohere2": {"sliding_window": 32},
    "granite": {},
    "granitemoe": EXPERTS,
    "smollm3": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": DENSE_FIRST,
    "deepseek_v3": {**DENSE_FIRST, **LATENT_ATTENTION},
    "deepseek_v32": {**DENSE_FIRST, **LATENT_ATTENTION},  # with linear layers that stay in fp32
    "gpt_oss": {**EXPERTS, "intermediate_size": 64, "sliding_window": 32},
    "phimoe": EXPERTS,
    "ernie4_5": {},
    "exaone4": {"sliding_window": 32},
    "seed_oss": {},
    "bamba": {**SSM, "attn_layer_indices": [1]},
    "falcon_h1": SSM,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "nemotron": {},
    "helium": {},
    "arcee": {},
    "hunyuan_v1_dense": {},
    "olmo3": {},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "ctrl": {"n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 4},  # with layers that have numbers for names
    "flex_olmo": EXPERTS,
    "minimax_m2": EXPERTS,
    "llama4_text": EXPERTS,
    "jetmoe": {**EXPERTS, "kv_channels": 32},  # with experts in attention, in rows of less than a block
    "ernie4_5_moe": DENSE_FIRST,
    "laguna": DENSE_FIRST,  # with weights that PEFT renames
    "dbrx": {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
        **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings")),
        **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": {**EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 64},
    "qwen3_5_text": LINEAR_ATTENTION,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 32},
    "mamba": {},
    "jamba": {
        **EXPERTS,
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_d_state": 16, "mamba_dt_rank": 16, "use_mamba_kernels": False},
    },
    "granitemoehybrid": {
        **EXPERTS,
        **SSM,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 64,
    },
    "nemotron_h": {
        **DENSE_FIRST,
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "moe_shared_expert_intermediate_size": 64,
    },
    "zamba2": {
        **SSM,
        "layer_types": ["mamba", "hybrid"],
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1],
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the config of a family with small numbers."""
    values = {**COMMON, **FAMILIES[family], **changes}
    return AutoConfig.for_model(family, **{key: value for key, value in values.items() if value is not None})


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model of a family, in fp32."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    return model


def save_tiny(directory: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random model of a family to `directory` as safetensors, and return the directory."""
    torch.nn.Module.to(tiny_model(family, **changes), dtype).save_pretrained(directory)
    return directory
