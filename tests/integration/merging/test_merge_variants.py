"""Every kind of adapter, merged: equal to the base with the adapter on it, and to PEFT's own merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from qlora_cli.settings.choices import MergeDtype
from tests.support.models.loading import save_model
from tests.support.models.reference_models import ROWS, load_plain
from tests.support.runs.merging import (
    Merged,
    assert_same,
    loaded_plain,
    merge,
    merge_again,
    merged_by_peft,
    on_plain,
    plain_logits,
    save,
    streamed_logits,
    verified,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LINEARS = ["q_proj", "v_proj", "o_proj", "down_proj"]
IN_OUT = ["c_attn", "c_proj"]  # of GPT-2, stored as (in, out)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "a regex": {"target_modules": r".*layers\.1\.self_attn\.[qk]_proj"},
    "some layers": {"layers_to_transform": [1]},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"o_proj": 5}},
    "patterns by rsLoRA": {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "DoRA": {"use_dora": True},
    "DoRA by rsLoRA": {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA on an embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "a head": {"target_modules": ["lm_head", "q_proj"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding and norms": {"modules_to_save": ["embed_tokens", "norm", "input_layernorm"]},
    "rows": {"trainable_token_indices": [5, 3, 3070]},
    "rows of both ends": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 7]}},
    "rows and a whole head": {"trainable_token_indices": [5, 3], "modules_to_save": ["lm_head"]},
}
ON_BIASES: dict[str, dict[str, Any]] = {
    "trained biases of its layers": {"bias": "lora_only"},
    "all biases trained": {"bias": "all"},
    "biases of its own": {"lora_bias": True},
}
ON_CONV1D: dict[str, dict[str, Any]] = {
    "plain": {},
    "fan_in_fan_out set": {"fan_in_fan_out": True},
    "DoRA": {"use_dora": True},
    "biases of its own": {"lora_bias": True},
    "all biases trained": {"bias": "all"},
    "patterns": {"rank_pattern": {"c_attn": 2}, "use_rslora": True},
    "an embedding": {"target_modules": ["wpe", "c_fc"]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), vocab_size=ROWS)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases in attention, which are not zero."""
    return with_biases(save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", vocab_size=ROWS))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_biases(save_model(tmp_path_factory.mktemp("gpt2"), "gpt2", vocab_size=ROWS))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), vocab_size=ROWS, tie_word_embeddings=True)


def with_biases(checkpoint: Path) -> Path:
    """Give a model biases other than the zeros that it is initialized with."""
    model = load_plain(checkpoint, torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(checkpoint)
    return checkpoint


def config_of(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **values})


def merged_exactly(base: Path, config: LoraConfig, place: Path) -> tuple[Merged, dict[str, torch.Tensor]]:
    """Merge a random adapter and compare logits; return the merge in the base's dtype, and that of PEFT."""
    model = on_plain(base, config)
    adapter = save(model, place / "adapter", save_embedding_layers=False)
    adapted = plain_logits(model)
    assert (adapted - plain_logits(load_plain(base))).abs().max() > 1e-3
    merged = merge(adapter, output=place / "merged")
    exact = merge_again(merged, place / "exact", dtype=MergeDtype.FP32)
    torch.testing.assert_close(plain_logits(loaded_plain(exact.directory)), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed_logits(exact, with_adapters=True), adapted, rtol=1e-5, atol=1e-5)
    verification = verified(merged)
    assert verification.is_exact, verification
    assert verification.modules is not None
    return merged, merged_by_peft(model, torch.bfloat16, place / "by-peft")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_was_trained_and_what_peft_merges_to_the_bit(llama: Path, kind: str, tmp_path: Path) -> None:
    merged, by_peft = merged_exactly(llama, config_of(**KINDS[kind]), tmp_path)
    assert_same(merged.tensors, by_peft)
    assert loaded_plain(merged.directory, "auto").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ON_BIASES)
def test_biases_are_what_peft_merges_to_the_bit(qwen2: Path, kind: str, tmp_path: Path) -> None:
    config = config_of(target_modules=["q_proj", "k_proj", "v_proj"], **ON_BIASES[kind])
    merged, by_peft = merged_exactly(qwen2, config, tmp_path)
    assert_same(merged.tensors, by_peft)


@pytest.mark.parametrize("kind", ON_CONV1D)
def test_weights_stored_as_in_out_are_what_peft_merges_to_the_bit(gpt2: Path, kind: str, tmp_path: Path) -> None:
    merged, by_peft = merged_exactly(gpt2, config_of(**{"target_modules": IN_OUT, **ON_CONV1D[kind]}), tmp_path)
    assert_same(merged.tensors, by_peft)


# ---- tied heads

TIED: dict[str, tuple[dict[str, Any], bool]] = {  # and whether the two must be untied
    "layers only": ({}, False),
    "the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "the head": ({"target_modules": ["lm_head", "q_proj"]}, True),
    "each its own": ({"target_modules": ["embed_tokens", "lm_head"]}, True),
    "one for both": ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
    "a whole head": ({"modules_to_save": ["lm_head"]}, True),
    "a whole embedding": ({"modules_to_save": ["embed_tokens"]}, True),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "both whole, as one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "rows of the embedding, as one": ({"trainable_token_indices": [5, 3]}, False),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_is_untied_only_if_it_differs_from_the_embedding(tied: Path, kind: str, tmp_path: Path) -> None:
    """PEFT's own merge changes both ends of a pair, and is no reference here: the model with the adapter is."""
    values, parts = TIED[kind]
    model = on_plain(tied, config_of(**values))
    adapter = save(model, tmp_path / "adapter", save_embedding_layers=False)
    adapted = plain_logits(model)
    exact = merge(adapter, output=tmp_path / "exact", dtype="fp32")
    assert exact.plan.unties == parts
    verification = verified(exact)
    assert verification.is_exact, verification
    assert ("lm_head.weight" in exact.tensors) == parts
    loaded = loaded_plain(exact.directory)
    assert loaded.config.tie_word_embeddings == (not parts)
    torch.testing.assert_close(plain_logits(loaded), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed_logits(exact, with_adapters=True), adapted, rtol=1e-5, atol=1e-5)
