"""Write an adapter: its tensors and its config, as in training, or converted for the original base.

An adapter that was read from a file is written in the same form: under the names of that file, with the base's
parameters that it held, and with the same config except for the path of the base.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from qlora_cli.adapters.initialization import is_pissa, to_plain_lora
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.state import adapter_state, origin_of, with_file_names
from qlora_cli.adapters.targets import ADAPTER
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import read_json

TARGET_KEYS = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
BASE_NAME = "base_model_name_or_path"


def save_adapter(model: PeftModel, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter of `model` to `directory` as in training, from `state` if given."""
    directory.mkdir(parents=True, exist_ok=True)
    origin = origin_of(model)
    tensors = with_file_names(adapter_state(model, state), origin)
    save_file(_unshared(tensors), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _write_config(model, directory, origin)
    _copy_permissions(directory)


def save_trained_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter of `model` to `directory`, for the base before the adapter was attached.

    PiSSA subtracts components from the base: what `save_adapter` writes is only for PEFT and for further training.
    """
    save_adapter(model, directory)
    if is_pissa(model.peft_config[ADAPTER]):
        to_plain_lora(model, directory)
        _copy_permissions(directory)


def _copy_permissions(directory: Path) -> None:
    """Give the weights the permissions of the config: safetensors makes its files readable by the owner only."""
    shutil.copymode(directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that safetensors can write: contiguous, and without shared storage."""
    seen: set[int] = set()
    unshared = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[key] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return unshared


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
    changed = (BASE_NAME, *TARGET_KEYS) if origin.is_converted else (BASE_NAME,)
    content = {**origin.config.content, **{key: written[key] for key in changed}}
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
