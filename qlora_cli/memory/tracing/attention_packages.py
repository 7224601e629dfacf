"""The attention of kernels that run on a GPU only, as PyTorch's flash attention on tensors without data.

flash-attn's kernels are those that PyTorch has a copy of. Flex attention saves the same tensors for its backward pass,
and needs less in it: no gradient of the queries in fp32, and none of the keys and values for each query head.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from qlora_cli.attention.flex import FLEX, finished, in_one_dtype
from qlora_cli.memory.tracing.sdpa import flash
from qlora_cli.settings.choices import Attention

FLASH_ON_META, FLEX_ON_META = "qlora_flash_on_meta", "qlora_flex_on_meta"
FLASH_PACKAGES = (Attention.FLASH_ATTENTION_2.value, Attention.FLASH_ATTENTION_3.value)


def attention_on_meta(implementation: str) -> str:
    """Return the name under which `implementation`, by transformers' name, is traced; most are traced themselves."""
    if implementation in FLASH_PACKAGES:
        AttentionInterface.register(FLASH_ON_META, _flash_attention)
        AttentionMaskInterface.register(FLASH_ON_META, flash_attention_mask)
        return FLASH_ON_META
    if implementation == FLEX:
        AttentionInterface.register(FLEX_ON_META, _flex_attention)
        AttentionMaskInterface.register(FLEX_ON_META, _no_mask)
        return FLEX_ON_META
    return implementation


def shown_name(implementation: str) -> str:
    """Return the name of `implementation` for people."""
    return Attention.FLEX_ATTENTION.value if implementation == FLEX else implementation


def _flash_attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention by flash-attn, `(batch, seq, heads, head_dim)`.

    Padded rows are packed before the kernel and unpacked after it, each a copy.
    """
    if attention_mask is not None:
        query, key, value = (tensor.clone() for tensor in (query, key, value))
    result = flash(query, key, value, dropout=dropout, scale=scaling)[0].transpose(1, 2)
    return (result if attention_mask is None else result.clone()), None


def _flex_attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Return flex attention, `(batch, seq, heads, head_dim)`, with what is computed around its kernel.

    The gradient of the sums of exponentials, which sinks need, is a number for each query and head, and left out.
    """
    query, key, value = in_one_dtype(query, key, value)
    return finished(*flash(query, key, value, scale=scaling), s_aux), None


def _no_mask(**_: Any) -> None:
    """Return no mask: the numbers of the blocks that are seen take four bytes for 128 queries by 128 keys."""
