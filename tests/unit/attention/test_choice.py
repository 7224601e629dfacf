"""The attention that is chosen for a model, by what was asked for, the model, the dtype and the GPU."""

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from qlora_cli.attention.choice import choose_attention
from qlora_cli.attention.expanded_heads import EXPANDED_SDPA
from qlora_cli.attention.flex import FLEX
from qlora_cli.errors import HardwareError, ModelError, QloraError
from qlora_cli.settings.choices import Attention
from tests.support.models.tiny_models import tiny_model

T4, A100, RTX_4090, H100, RTX_5090 = (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)
BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


def chosen(
    family: str,
    asked: Attention = Attention.AUTO,
    *,
    dtype: torch.dtype = BF16,
    capability: tuple[int, int] | None = A100,
    **changes: int,
) -> str:
    choice = choose_attention(asked, tiny_model(family, **changes), dtype=dtype, capability=capability)
    assert choice.name != Attention.AUTO
    assert choice.implementation == "eager" or choice.implementation in AttentionInterface()
    assert choice.implementation == "eager" or choice.implementation in AttentionMaskInterface()
    return choice.implementation


@pytest.mark.parametrize("capability", [None, T4, A100])
def test_models_that_pytorch_has_no_kernel_for_compute_by_blocks(capability: tuple[int, int] | None) -> None:
    for family in ("gemma2", "gpt_oss"):
        assert chosen(family, capability=capability, dtype=FP32) == "blockwise"
        assert chosen(family, Attention.EAGER, capability=capability, dtype=FP32) == "eager"
    assert chosen("bloom", capability=capability, dtype=FP32) == "eager"  # which reads its mask


@pytest.mark.parametrize(
    ("dtype", "capability", "changes", "is_expanded"),
    [
        (HALF, T4, {}, True),
        (FP32, T4, {}, True),
        (BF16, A100, {}, False),
        (FP32, A100, {}, True),
        (BF16, RTX_4090, {}, False),
        (BF16, RTX_4090, {"head_dim": 208}, True),
        (BF16, A100, {"head_dim": 208}, False),
        (HALF, T4, {"num_key_value_heads": 4}, False),
        (FP32, None, {}, False),  # the CPU's kernel shares keys and values
    ],
)
def test_shared_keys_and_values_are_expanded_only_where_pytorch_would_store_all_scores(
    dtype: torch.dtype, capability: tuple[int, int] | None, changes: dict[str, int], is_expanded: bool
) -> None:
    expected = EXPANDED_SDPA if is_expanded else "sdpa"
    for asked in (Attention.AUTO, Attention.SDPA):
        assert chosen("llama", asked, dtype=dtype, capability=capability, **changes) == expected
    choice = choose_attention(Attention.AUTO, tiny_model("llama", **changes), dtype=dtype, capability=capability)
    assert choice.name == Attention.SDPA


@pytest.mark.parametrize(
    ("family", "asked", "dtype", "capability", "error", "message"),
    [
        ("gpt_oss", Attention.SDPA, BF16, A100, ModelError, "GptOssForCausalLM does not compute attention by sdpa"),
        ("bloom", Attention.BLOCKWISE, BF16, A100, ModelError, "does not compute attention by blockwise"),
        ("llama", Attention.BLOCKWISE, BF16, A100, ModelError, "blockwise is for models without a kernel of PyTorch"),
        ("llama4_text", Attention.FLASH_ATTENTION_2, BF16, A100, ModelError, "does not compute attention by flash"),
        # transformers would download a kernel instead.
        ("gpt_oss", Attention.FLASH_ATTENTION_2, BF16, A100, ModelError, "flash-attn has no kernel for the attention"),
        ("llama", Attention.FLASH_ATTENTION_2, BF16, None, HardwareError, "needs an NVIDIA GPU"),
        ("llama", Attention.FLASH_ATTENTION_2, HALF, T4, HardwareError, "needs an Ampere GPU"),
        ("llama", Attention.FLASH_ATTENTION_2, FP32, A100, ModelError, "computes in 16 bit only"),
        ("gpt_oss", Attention.FLASH_ATTENTION_3, BF16, H100, ModelError, "flash-attn-3 has no kernel for the"),
        ("llama4_text", Attention.FLASH_ATTENTION_3, BF16, H100, ModelError, "does not compute attention by flash"),
        ("llama", Attention.FLASH_ATTENTION_3, BF16, None, HardwareError, "needs an NVIDIA GPU"),
        ("llama", Attention.FLASH_ATTENTION_3, HALF, T4, HardwareError, "needs an Ampere GPU"),
        ("llama", Attention.FLASH_ATTENTION_3, BF16, A100, HardwareError, "is made for Hopper GPUs"),
        ("llama", Attention.FLASH_ATTENTION_3, BF16, RTX_5090, HardwareError, "is made for Hopper GPUs"),
        ("llama", Attention.FLASH_ATTENTION_3, FP32, H100, ModelError, "computes in 16 bit only"),
        ("gpt2", Attention.FLASH_ATTENTION_3, BF16, H100, ModelError, "drops 0.1 of its attention"),
        ("gpt2", Attention.FLEX_ATTENTION, BF16, A100, ModelError, "does not compute attention by flex_attention"),
        ("bloom", Attention.FLEX_ATTENTION, BF16, A100, ModelError, "does not compute attention by flex_attention"),
        ("llama", Attention.FLEX_ATTENTION, BF16, None, HardwareError, "needs an NVIDIA GPU"),
        ("llama", Attention.FLEX_ATTENTION, HALF, T4, HardwareError, "needs an Ampere GPU"),
    ],
)
def test_what_does_not_work_is_refused(
    family: str,
    asked: Attention,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    error: type[QloraError],
    message: str,
) -> None:
    with pytest.raises(error) as raised:
        chosen(family, asked, dtype=dtype, capability=capability)
    assert message in raised.value.message
    assert "leave --attention out" in (raised.value.hint or "").lower()


def test_flash_attn_computes_soft_caps() -> None:
    assert chosen("gemma2", Attention.FLASH_ATTENTION_2) == "flash_attention_2"
    assert chosen("gemma2", Attention.FLASH_ATTENTION_3, capability=H100) == "flash_attention_3"


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("capability", [A100, RTX_4090, H100, RTX_5090])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_flex_attention_is_only_used_where_it_is_named(
    family: str, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    assert chosen(family, Attention.FLEX_ATTENTION, capability=capability, dtype=dtype) == FLEX
    assert chosen(family, capability=capability, dtype=dtype) != FLEX


def test_the_dropout_of_a_model_is_found_under_all_its_names() -> None:
    for family, name in (("llama", "attention_dropout"), ("gpt2", "attn_pdrop"), ("gpt_neox", "attention_dropout")):
        for asked in (Attention.FLEX_ATTENTION, Attention.FLASH_ATTENTION_3)[family == "gpt2" :]:
            changes: Any = {name: 0.25}
            with pytest.raises(ModelError) as raised:
                chosen(family, asked, capability=H100, **changes)
            assert "drops 0.25 of its attention" in raised.value.message
            changes = {name: 0.0}
            assert chosen(family, asked, capability=H100, **changes) in (FLEX, asked)
