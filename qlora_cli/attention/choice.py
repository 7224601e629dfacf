"""Choose how a model computes attention: what was asked for, or the best that is known to be right for the model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_cli.attention.blockwise import has_own_attention, register_blockwise
from qlora_cli.attention.expanded_heads import EXPANDED_SDPA, register_expanded_sdpa
from qlora_cli.attention.flex import FLEX, register_flex
from qlora_cli.attention.sdpa_rules import stores_grouped_scores
from qlora_cli.errors import HardwareError, ModelError
from qlora_cli.hardware.device import AMPERE
from qlora_cli.settings.choices import Attention

LEAVE_OUT = "Leave --attention out."
HOPPER = (9, 0)
FLASH = (Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_3)
WITHOUT_DROPOUT = (Attention.FLEX_ATTENTION, Attention.FLASH_ATTENTION_3)


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
    _check_gpu(chosen, capability)
    if chosen in FLASH and dtype == torch.float32:
        raise ModelError(f"{chosen.value} computes in 16 bit only", hint="Use --dtype bf16 or leave --attention out.")
    if chosen == Attention.FLEX_ATTENTION:
        register_flex()
        return ChosenAttention(name=chosen, implementation=FLEX)
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
        Attention.FLEX_ATTENTION: bool(model._supports_flex_attn),
        **dict.fromkeys(FLASH, bool(model._supports_flash_attn)),
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
    if chosen in FLASH and compatible and chosen.value not in compatible:
        raise ModelError(f"{chosen.package} has no kernel for the attention of {name}", hint=LEAVE_OUT)
    if chosen in WITHOUT_DROPOUT and (dropout := _dropout_of(model)):
        raise ModelError(
            f"{name} drops {dropout:g} of its attention in training, and {chosen.value} drops nothing", hint=LEAVE_OUT
        )


def _dropout_of(model: PreTrainedModel) -> float:
    """Return the share of attention that `model` drops in training, under any of its names in configs."""
    content = model.config.get_text_config().to_dict()
    rates = (rate for name, rate in content.items() if "att" in name and "drop" in name)
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


def _check_gpu(chosen: Attention, capability: tuple[int, int] | None) -> None:
    """Raise an error where a kernel for GPUs does not run, or its backward pass does not."""
    if chosen not in (Attention.FLEX_ATTENTION, *FLASH):
        return
    if capability is None:
        raise HardwareError(f"{chosen.value} needs an NVIDIA GPU", hint=LEAVE_OUT)
    if capability < AMPERE:
        raise HardwareError(f"{chosen.value} needs an Ampere GPU or a newer one", hint=LEAVE_OUT)
    if chosen == Attention.FLASH_ATTENTION_3 and capability != HOPPER:
        raise HardwareError(f"{chosen.value} is made for Hopper GPUs, such as the H100", hint=LEAVE_OUT)
