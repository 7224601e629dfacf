"""Which kernel PyTorch chooses for `scaled_dot_product_attention` on a GPU, by the rules of torch 2.11 to 2.13.

`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`: flash before memory-efficient before math, which stores all
scores. cuDNN, which Hopper and Blackwell GPUs would prefer, is turned off (`hardware.cudnn`). From 2.14 on, the
memory-efficient kernel takes grouped keys and values too.
"""

import torch
from torch import nn

from qlora_cli.hardware.device import AMPERE
from qlora_cli.settings.choices import SdpaBackend

MAX_FLASH_HEAD_DIM = 256
# Consumer GPUs, whose shared memory is too small for flash attention's backward pass with heads wider than 192. Heads
# wider than 224 fit nevertheless if nothing is dropped.
SMALL_SHARED_MEMORY = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
MAX_HEAD_DIM_THERE, MIN_WIDE_HEAD_DIM_THERE = 192, 225


def choose_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    has_mask: bool,
    enable_gqa: bool,
    capability: tuple[int, int],
    dropout: float = 0.0,
) -> SdpaBackend:
    """Return what PyTorch chooses on a GPU of `capability`; tensors are `(batch, heads, seq, head_dim)`."""
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    head_dim = query.shape[-1]
    same_dim = head_dim == key.shape[-1] == value.shape[-1]
    if not has_mask and same_dim and flash_takes(head_dim, query.dtype, capability, trains=trains, dropout=dropout):
        return SdpaBackend.FLASH
    grouped = enable_gqa and key.shape[1] != query.shape[1]
    if not grouped and _efficient_takes(query, key, value, capability):
        return SdpaBackend.EFFICIENT
    return SdpaBackend.MATH


def flash_takes(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], *, trains: bool, dropout: float = 0.0
) -> bool:
    """Return whether flash attention computes heads of this width, without a mask.

    `check_head_dim_size_flash`, `check_flash_attention_hardware_support`, `check_dtypes_low_precision` and
    `check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`.
    """
    if capability < AMPERE or dtype not in (torch.float16, torch.bfloat16) or head_dim > MAX_FLASH_HEAD_DIM:
        return False
    if not trains or not _has_small_shared_memory(capability):
        return True
    return head_dim <= MAX_HEAD_DIM_THERE or (head_dim >= MIN_WIDE_HEAD_DIM_THERE and dropout == 0)


def _efficient_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, capability: tuple[int, int]) -> bool:
    """`check_head_dim_size_mem_efficient`: rows have to be aligned to what a tensor core loads."""
    if query.dtype == torch.bfloat16 and capability < AMPERE:
        return False
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    alignment = 8 if is_half else 4 if capability >= AMPERE else 1
    dims = query.shape[-1], value.shape[-1]
    return query.shape[-1] == key.shape[-1] and all(dim % alignment == 0 for dim in dims)


def stores_grouped_scores(model: nn.Module, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Return whether layers of `model` share keys and values so that PyTorch stores all scores to train them."""
    return any(
        not flash_takes(
            getattr(module, "head_dim", 0),
            dtype,
            capability,
            trains=True,
            dropout=getattr(module, "attention_dropout", 0.0),
        )
        for module in model.modules()
        if getattr(module, "num_key_value_groups", 1) > 1
    )


def representative_capability(capability: tuple[int, int], model: nn.Module) -> tuple[int, int]:
    """Return the compute capability that stands for all on which PyTorch computes `model` with the same kernels."""
    if capability < AMPERE:
        return 7, 5
    head_dims = (getattr(module, "head_dim", 0) for module in model.modules())
    has_wide_heads = any(isinstance(dim, int) and dim > MAX_HEAD_DIM_THERE for dim in head_dims)
    return (8, 6) if has_wide_heads and _has_small_shared_memory(capability) else (8, 0)


def _has_small_shared_memory(capability: tuple[int, int]) -> bool:
    return any(lowest <= capability <= highest for lowest, highest in SMALL_SHARED_MEMORY)
