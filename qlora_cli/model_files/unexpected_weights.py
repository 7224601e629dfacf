"""Unexpected weights: tensors of a checkpoint that the model has no parameter for, and which of them may be ignored.

Any other unexpected weight is an error: the model would not be the one that was saved. The loader and `merge` use the
same function; what the loader ignores, `merge` copies unchanged.
"""

import re
from collections.abc import Collection, Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from qlora_cli.model_files.checkpoint import TensorHeader
from qlora_cli.model_files.model_config import TOWERS, ModelConfig

# Recomputed wherever they are needed: rotary frequencies and their tables, stored per layer in older checkpoints.
ROTARY = re.compile(r"(^|\.)\w*(rotary|pos_emb)\w*\.(\w*inv_freq|cos_cached|sin_cached|cos_sin_cache)$")
# Causal masks, and the value that they mask with, which GPT-2 and its kin stored in each layer. A bias is a vector.
MASK = re.compile(r"(^|\.)\w*(attn|attention)\.((attn|attention)\.)?(bias|masked_bias|causal_mask)$")
POSITIONS = re.compile(r"(^|\.)position_ids$")
WHOLE_NUMBERS = {"I64", "I32"}
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Modules that most multi-token prediction layers have in addition (DeepSeek-V3, GLM-4.5).
AHEAD = re.compile(r"(?:^|\.)layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head|embed_tokens)\.")


def may_be_ignored(
    model: PreTrainedModel, base: ModelConfig, name: str, header: TensorHeader | None, mtp_layers: Collection[int]
) -> bool:
    """Return whether the tensor `name` of a checkpoint, which `model` has no parameter for, is no part of the model.

    `name` is its name in the file, or as transformers renames it; `header` has its shape, if it is known; `mtp_layers`
    are the checkpoint's `prediction_layers`.
    """
    renamed = base.renamed(name)
    return (
        base.is_in_tower(name)
        or any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
        or any(_is_same(renamed, buffer, model.base_model_prefix) for buffer in _non_persistent_buffers(model))
        or ROTARY.search(name) is not None
        or _is_mask(name, header)
        or (POSITIONS.search(name) is not None and header is not None and header.dtype in WHOLE_NUMBERS)
        or _layer_of(name) in mtp_layers
    )


def prediction_layers(config: PreTrainedConfig, names: Collection[str]) -> frozenset[int]:
    """Return the multi-token prediction (MTP) layers of a checkpoint with tensors of these `names`.

    They follow the last layer, as many as the config says. Layers of towers are not among them.
    """
    number = getattr(config, "num_nextn_predict_layers", None)
    if type(number) is not int:
        return frozenset()
    predicting = range(config.num_hidden_layers, config.num_hidden_layers + number)
    layers = (_layer_of(name) for name in names if not any(tower in name for tower in TOWERS))
    return frozenset(layer for layer in layers if layer is not None and layer in predicting)


def note_on_prediction(config: PreTrainedConfig, names: Collection[str], fate: str) -> str | None:
    """Return a note on the MTP layers of a checkpoint and their `fate`; None if it has none."""
    layers = sorted(prediction_layers(config, names))
    if not layers:
        return None
    subject = (
        f"layer {layers[0]} of the checkpoint predicts"
        if len(layers) == 1
        else f"layers {', '.join(map(str, layers))} predict"
    )
    note = f"{subject} tokens further ahead (num_nextn_predict_layers): {fate}"
    if {int(match[1]) for name in names if (match := AHEAD.search(name))}.issuperset(layers):
        return note
    number = config.num_hidden_layers
    return f"{note}. Without an eh_proj it may be an ordinary layer: is num_hidden_layers, {number}, right?"


def hint_on_unexpected(config: PreTrainedConfig, names: Collection[str]) -> str:
    """Return what to do about unexpected weights, by their names."""
    if any(".lora_" in name for name in names):
        return "They belong to an adapter. Save the model without it, or merged (merge_and_unload)."
    layers = [-1 if (layer := _layer_of(name)) is None else layer for name in names]
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is not None and min(layers) >= num_layers:
        return (
            f"num_hidden_layers is {num_layers} in config.json, and the weights have layers up to number "
            f"{max(layers)}: correct it, or download config.json again."
        )
    return "The model would not be the one that was saved. Is config.json of another model or version?"


def header_by_name(headers: Mapping[str, TensorHeader], name: str) -> TensorHeader | None:
    """Return the header of the tensor that transformers calls `name`, possibly with the base model's prefix."""
    if name in headers:
        return headers[name]
    return next((header for key, header in headers.items() if name.endswith(f".{key}")), None)


def _non_persistent_buffers(model: PreTrainedModel) -> set[str]:
    """Return the names of the buffers of `model` that are not in its state dict."""
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
