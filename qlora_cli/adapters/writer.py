"""The one writer of an adapter: its tensors and its config, as it trains, or for its base as it was before.

An adapter that came from a file goes back to one as it came: under the names that the file had, with what it held of
the base, and with a config of which only the place of the base has changed.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from qlora_cli.adapters.initialization import is_pissa, to_plain_lora
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.state import adapter_state, in_file, origin_of
from qlora_cli.adapters.targets import ADAPTER
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import read_json

OF_TARGETS = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
BASE_NAME = "base_model_name_or_path"


def save_adapter(model: PeftModel, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter of `model` to `directory` as it trains; `state` are its tensors, gathered from elsewhere."""
    directory.mkdir(parents=True, exist_ok=True)
    model.create_or_update_model_card(str(directory))
    origin = origin_of(model)
    tensors = in_file(adapter_state(model, state), origin)
    save_file(_unshared(tensors), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _write_config(model, directory, origin)
    _let_read(directory)


def save_trained_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter of `model` to `directory`, for the base as it was before the adapter was attached.

    PiSSA takes parts out of the base: what `save_adapter` writes of it is for training on, and for PEFT alone.
    """
    save_adapter(model, directory)
    if is_pissa(model.peft_config[ADAPTER]):
        to_plain_lora(model, directory)
        _let_read(directory)


def _let_read(directory: Path) -> None:
    """Let those read the weights who may read the rest: safetensors keeps what it writes to its owner."""
    shutil.copymode(directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that safetensors can write: contiguous, and no two of one storage."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return found


def _write_config(model: PeftModel, directory: Path, origin: Adapter | None) -> None:
    config = model.peft_config[ADAPTER]
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.get_base_model().name_or_path or None
    was_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(directory)
    config.inference_mode = was_inference
    if origin is None:
        return
    file = directory / ADAPTER_CONFIG
    written = read_json(file)
    changed = (BASE_NAME, *OF_TARGETS) if origin.is_converted else (BASE_NAME,)
    content = {**origin.config.content, **{key: written[key] for key in changed}}
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
