"""The attention that is chosen for a model, by what was asked for, the model, the dtype and the GPU."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from qlora_cli.attention.choice import choose_attention
from qlora_cli.attention.expanded_heads import EXPANDED_SDPA
from qlora_cli.errors import HardwareError, ModelError, QloraError
from qlora_cli.settings.choices import Attention
from tests.support.models.tiny_models import tiny_model

T4, A100, RTX_4090 = (7, 5), (8, 0), (8, 9)
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
