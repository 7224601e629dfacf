"""The kernel of attention that PyTorch chooses on a GPU, run on tensors without data.

PyTorch chooses a backend of `scaled_dot_product_attention` by device; on the meta device it would always be the one
that stores all scores. A function mode (`functions`) calls the GPU's choice instead (`attention.sdpa_rules`), with the
operations that PyTorch puts around it.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its conventional name

from qlora_cli.settings.choices import SdpaBackend

aten = torch.ops.aten


def attend(
    backend: SdpaBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Return the result of attention, `(batch, heads, seq, head_dim)`, by the kernel of `backend`."""
    if backend == SdpaBackend.FLASH:
        return flash(query, key, value, dropout=dropout, is_causal=is_causal, scale=scale)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if backend == SdpaBackend.EFFICIENT:
        return _efficient(query, key, value, mask, dropout, is_causal, scale)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scale)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of flash attention, and the logarithms of sums of exponentials, `(batch, heads, seq)`."""
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if pad := -head_dim % 8:  # pad_last_dim<8> in aten/src/ATen/native/transformers/attention.cpp
        query, key, value = (F.pad(tensor, (0, pad)) for tensor in (query, key, value))
    result, sums, *_ = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal, False, scale=scale
    )
    return (result[..., :head_dim] if pad else result), sums


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    bias = None
    if mask is not None:
        bias = _as_bias(mask, query).expand(*query.shape[:3], key.shape[2])
    result: torch.Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad or key.requires_grad, dropout, is_causal, scale=scale
    )[0]
    return result


def _as_bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return a mask as the kernel adds it to the scores, with rows aligned to 16 elements (`preprocess_mask`)."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask.logical_not(), float("-inf"), torch.zeros((), dtype=query.dtype, device=mask.device))
    num_keys = mask.shape[-1]
    if pad := -num_keys % 16:  # pad_bias<16>
        mask = F.pad(mask, (0, pad))[..., :num_keys]
    return mask
