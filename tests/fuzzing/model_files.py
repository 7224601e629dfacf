"""Headers of safetensors files, and configs of adapters, which are then fitted to a base."""

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from qlora_cli.adapters.reader import fit, open_adapter
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, lora_settings_of, notes_on_ignored_keys
from qlora_cli.model_files.checkpoint import read_header
from qlora_cli.model_files.model_config import config_from
from qlora_cli.quantization.storage_plan import build_on_meta
from tests.fuzzing.frame import Generator, Target, damage
from tests.fuzzing.json_values import as_bytes
from tests.support.models.tiny_models import tiny_config, tiny_model

# Keys of a config that PEFT does not write unless they are used, added so that they are changed as well.
MORE = {
    "layer_replication": [[0, 1], [0, 2]],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 8},
    "exclude_modules": ["k_proj"],
    "trainable_token_indices": [1, 2],
    "modules_to_save": ["norm"],
    "target_parameters": ["mlp.down_proj.weight"],
    "megatron_config": {"x": 1},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "loftq_config": {"x": 1},
    "init_lora_weights": "pissa_niter_4",
    "use_qalora": True,
    "qalora_group_size": 4,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2},
    "kasa_config": {"beta": 0.1, "gamma": 0.1},
    "velora_config": {"num_groups": 4},
    "monteclora_config": {"num_samples": 2},
    "alora_invocation_tokens": [1, 2],
}


def _headers(directory: Path) -> Callable[[Generator], None]:
    path = directory / "model.safetensors"
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a": np.zeros((2, 3), np.float32),
        "b": np.ones(5, np.float16),
        "é": np.zeros((), np.int64),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    num_bytes = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + num_bytes]), whole[8 + num_bytes :]

    def play_round(chance: Generator) -> None:
        if chance.random() < 0.3:
            content = damage(whole, chance)
        else:
            written = as_bytes(header, chance) if chance.random() < 0.95 else json.dumps(header).encode()
            content = struct.pack("<Q", len(written)) + written + data
        path.write_bytes(content)
        tensors_read = read_header(directory, path.name)
        assert {one.name: one.shape for one in tensors_read} == {
            key: each.shape for key, each in load_file(path).items()
        }

    return play_round


def _adapters(directory: Path) -> Callable[[Generator], None]:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(directory)
    file = directory / ADAPTER_CONFIG
    content = json.loads(file.read_text())
    base = config_from("tiny", tiny_config("llama").to_dict())

    def play_round(chance: Generator) -> None:
        more = {key: value for key, value in MORE.items() if chance.random() < 0.1}
        file.write_bytes(as_bytes({**content, **more}, chance))
        stored = open_adapter(directory, allow_pickle=False)
        lora_settings_of(stored.config)
        list(notes_on_ignored_keys([directory]))
        fit(stored, build_on_meta(deepcopy(base.config), torch.float32), base)  # PEFT writes into its config

    return play_round


HEADER = Target(name="header", prepare=_headers, num_rounds=3000)
ADAPTER = Target(name="adapter", prepare=_adapters, num_rounds=300)
