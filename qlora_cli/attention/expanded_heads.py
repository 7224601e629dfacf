"""SDPA with a copy of the shared keys and values for each query head, where only PyTorch's math kernel shares them.

Up to torch 2.13 only flash attention takes grouped keys and values. Where a GPU has no flash attention for a model,
PyTorch falls back on a kernel that stores all scores, quadratic in the length; the copies are linear in it.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask

# The name that it is registered under in this process; no file has it. transformers knows by "sdpa" that a model has
# to support that.
EXPANDED_SDPA = "sdpa_expanded_heads"


def register_expanded_sdpa() -> None:
    """Make it known to transformers."""
    AttentionInterface.register(EXPANDED_SDPA, expanded_sdpa)
    AttentionMaskInterface.register(EXPANDED_SDPA, sdpa_mask)


def expanded_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' `sdpa` does, `(batch, seq, heads, head_dim)`.

    `query` is `(batch, heads, seq, head_dim)`; `key` and `value` have as many heads or fewer. They are expanded where
    transformers would leave that to the kernel; with a mask it does so itself, and a single query has few scores.
    """
    if query.shape[2] > 1 and use_gqa_in_sdpa(attention_mask, key, value):
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result
