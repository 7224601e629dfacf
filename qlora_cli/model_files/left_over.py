"""Tensors of a checkpoint that the model has no place for, and that may be passed over all the same, by kind.

Everything else that is left over is an error: the model would not be the one that was saved. The loader and `merge`
ask the same function; what the one passes over, the other copies as it is.
"""

import re
from collections.abc import Collection, Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from qlora_cli.model_files.checkpoint import TensorHeader
from qlora_cli.model_files.model_config import TOWERS, ModelConfig

# Computed anew wherever they are needed: rotary frequencies and their tables, of each layer in older checkpoints.
ROTARY = re.compile(r"(^|\.)\w*(rotary|pos_emb)\w*\.(\w*inv_freq|cos_cached|sin_cached|cos_sin_cache)$")
# Causal masks, and the number that they mask with, which GPT-2 and its kin stored in each layer. A bias is a vector.
MASK = re.compile(r"(^|\.)\w*(attn|attention)\.((attn|attention)\.)?(bias|masked_bias|causal_mask)$")
POSITIONS = re.compile(r"(^|\.)position_ids$")
WHOLE_NUMBERS = {"I64", "I32"}
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What a layer that predicts tokens further ahead mostly holds besides (DeepSeek-V3, GLM-4.5).
AHEAD = re.compile(r"(?:^|\.)layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head|embed_tokens)\.")


def may_be_left_out(
    model: PreTrainedModel, base: ModelConfig, name: str, header: TensorHeader | None, ahead: Collection[int]
) -> bool:
    """Whether the tensor `name` of a checkpoint, for which `model` has no place, is no part of what is trained.

    `name` is that of the file, or what transformers makes of it; `header` tells its shape, if it is known; `ahead` are
    the checkpoint's `layers_ahead`.
    """
    renamed = base.renamed(name)
    return (
        base.is_left_out(name)
        or any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
        or any(_is_same(renamed, buffer, model.base_model_prefix) for buffer in _computed(model))
        or ROTARY.search(name) is not None
        or _is_mask(name, header)
        or (POSITIONS.search(name) is not None and header is not None and header.dtype in WHOLE_NUMBERS)
        or _layer_of(name) in ahead
    )


def layers_ahead(config: PreTrainedConfig, names: Collection[str]) -> frozenset[int]:
    """Return which layers of a checkpoint with tensors of these `names` predict tokens further ahead.

    They are those after the last, as many as the config says. Layers of towers are none.
    """
    number = getattr(config, "num_nextn_predict_layers", None)
    if type(number) is not int:
        return frozenset()
    predicting = range(config.num_hidden_layers, config.num_hidden_layers + number)
    found = (_layer_of(name) for name in names if not any(tower in name for tower in TOWERS))
    return frozenset(layer for layer in found if layer is not None and layer in predicting)


def note_on_prediction(config: PreTrainedConfig, names: Collection[str], fate: str) -> str | None:
    """Return in words which layers of a checkpoint predict tokens further ahead, and their fate; None if none."""
    layers = sorted(layers_ahead(config, names))
    if not layers:
        return None
    which = (
        f"layer {layers[0]} of the checkpoint predicts"
        if len(layers) == 1
        else f"layers {', '.join(map(str, layers))} predict"
    )
    note = f"{which} tokens further ahead (num_nextn_predict_layers): {fate}"
    if {int(match[1]) for name in names if (match := AHEAD.search(name))}.issuperset(layers):
        return note
    return (
        f"{note}. Without an eh_proj it may be as any other: is num_hidden_layers, {config.num_hidden_layers}, right?"
    )


def hint_on_left_over(config: PreTrainedConfig, names: Collection[str]) -> str:
    """Return what to do about weights that a checkpoint has too many, by what they are called."""
    if any(".lora_" in name for name in names):
        return (
            "These are of an adapter: save the model without it, or merged (merge_and_unload), and the adapter apart."
        )
    layers = [-1 if (layer := _layer_of(name)) is None else layer for name in names]
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is not None and min(layers) >= num_layers:
        return (
            f"num_hidden_layers is {num_layers} in config.json, and the weights have layers up to number "
            f"{max(layers)}: correct it, or get config.json anew."
        )
    return "The model would not be the one that was saved. Is config.json of another model or version?"


def by_name(headers: Mapping[str, TensorHeader], name: str) -> TensorHeader | None:
    """Return the tensor that transformers calls `name`: it may have put the name of the base model before it."""
    if name in headers:
        return headers[name]
    return next((header for key, header in headers.items() if name.endswith(f".{key}")), None)


def _computed(model: PreTrainedModel) -> set[str]:
    """Return the names of the buffers that `model` computes by itself and does not store."""
    return {name for name, _ in model.named_buffers()} - model.state_dict().keys()


def _is_same(name: str, buffer: str, prefix: str) -> bool:
    return name == buffer or f"{prefix}.{name}" == buffer


def _is_mask(name: str, header: TensorHeader | None) -> bool:
    if header is None or MASK.search(name) is None:
        return False
    shape = header.shape
    if name.endswith("masked_bias"):
        return shape in {(), (1,)}
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _layer_of(name: str) -> int | None:
    return int(match[1]) if (match := LAYER.search(name)) else None
