"""Choose how a model computes attention: what was asked for, or the best that is known to be right for the model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_cli.attention.blockwise import has_own_attention, register_blockwise
from qlora_cli.attention.expanded_heads import EXPANDED_SDPA, register_expanded_sdpa
from qlora_cli.attention.sdpa_rules import stores_grouped_scores
from qlora_cli.errors import HardwareError, ModelError
from qlora_cli.hardware.device import AMPERE
from qlora_cli.settings.choices import Attention

LEAVE_OUT = "Leave --attention out."


@dataclass(frozen=True, kw_only=True)
class ChosenAttention:
    """The attention of a model: the value of the setting, never `auto`, and the name that transformers has for it."""

    name: Attention
    implementation: str


def choose_attention(
    asked: Attention, model: PreTrainedModel, *, dtype: torch.dtype, capability: tuple[int, int] | None
) -> ChosenAttention:
    """Return the attention for `model` in `dtype` on a GPU of `capability`; None for a CPU.

    `auto` does not depend on the packages that are installed, so that a prediction holds for every machine with the
    GPU. What is chosen is made known to transformers.

    Raises:
        HardwareError: what was asked for does not run on this device.
        ModelError: the model does not compute attention so, or not in this dtype.
    """
    kernels = _kernels_of(model)
    chosen = _best_of(kernels) if asked == Attention.AUTO else asked
    _check_model(chosen, model, kernels)
    if chosen == Attention.FLASH_ATTENTION_2:
        _check_flash_attention(dtype, capability)
    if chosen == Attention.BLOCKWISE:
        register_blockwise()
    if chosen == Attention.SDPA and capability is not None and stores_grouped_scores(model, dtype, capability):
        register_expanded_sdpa()
        return ChosenAttention(name=chosen, implementation=EXPANDED_SDPA)
    return ChosenAttention(name=chosen, implementation=chosen.value)


def _kernels_of(model: PreTrainedModel) -> dict[Attention, bool]:
    """Return which kernels compute the attention of `model`; eager attention always does.

    Blocks of queries can be computed apart if the model hands on its mask without reading it. It does so if it knows
    flex attention, whose mask is no tensor either.
    """
    return {
        Attention.SDPA: bool(model._supports_sdpa),
        Attention.BLOCKWISE: bool(model._supports_flex_attn) and has_own_attention(model),
        Attention.FLASH_ATTENTION_2: bool(model._supports_flash_attn),
    }


def _best_of(kernels: dict[Attention, bool]) -> Attention:
    return next((kernel for kernel in (Attention.SDPA, Attention.BLOCKWISE) if kernels[kernel]), Attention.EAGER)


def _check_model(chosen: Attention, model: PreTrainedModel, kernels: dict[Attention, bool]) -> None:
    name = type(model).__name__
    if chosen == Attention.BLOCKWISE and kernels[Attention.SDPA]:
        raise ModelError(
            f"blockwise is for models without a kernel of PyTorch, and {name} has one that needs as little memory",
            hint=LEAVE_OUT,
        )
    if not kernels.get(chosen, True):
        raise ModelError(f"{name} does not compute attention by {chosen.value}", hint=LEAVE_OUT)
    # transformers would replace the package by another kernel, which it downloads from the hub.
    compatible = getattr(model, "_compatible_flash_implementations", None)
    if chosen == Attention.FLASH_ATTENTION_2 and compatible and chosen.value not in compatible:
        raise ModelError(f"flash-attn has no kernel for the attention of {name}", hint=LEAVE_OUT)


def _check_flash_attention(dtype: torch.dtype, capability: tuple[int, int] | None) -> None:
    if capability is None:
        raise HardwareError("flash_attention_2 needs an NVIDIA GPU", hint=LEAVE_OUT)
    if capability < AMPERE:
        raise HardwareError("flash_attention_2 needs an Ampere GPU or a newer one", hint=LEAVE_OUT)
    if dtype == torch.float32:
        raise ModelError(
            "flash_attention_2 computes in 16 bit only", hint="Use --dtype bf16 or leave --attention out."
        )
