"""Adapters on tiny models: attached according to settings, trained for a few steps, saved and loaded again."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter, load_adapter
from qlora_cli.adapters.reader import Adapter, fit, open_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.quantization.storage_plan import build_on_meta
from qlora_cli.settings.models import LoraSettings
from tests.support.models.loading import asked_load, load, logits
from tests.support.models.reference_models import IDS

PREFIX = "base_model.model."


def settings_of(**values: Any) -> LoraSettings:
    """Return the settings of an adapter, of rank 8 unless another is given."""
    return LoraSettings.model_validate({"rank": 8, **values})


def load_for(checkpoint: Path, lora: LoraSettings, **flags: object) -> LoadedModel:
    """Load a base for an adapter, as `train` does."""
    silent = SilentReporter()
    return load_planned(plan_load(asked_load(checkpoint, **flags), silent), silent, lora=lora)


def adapt(checkpoint: Path, lora: LoraSettings, **flags: object) -> PeftModel:
    """Load a base and attach an adapter to it."""
    return attach_adapter(load_for(checkpoint, lora, **flags).base, lora)[0]


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """Return the adapters by the name of their layer or, on fused experts, of their parameter."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer", "")
        + (f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def frozen(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are not trained."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def train_steps(model: PeftModel, num_steps: int = 2, learning_rate: float = 1e-2) -> list[float]:
    """Train, and return the losses before each step and after the last one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for step in range(num_steps + 1):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        losses.append(loss.item())
        if step < num_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def read_for(model: PreTrainedModel, directory: Path) -> Adapter:
    """Return the adapter in `directory`, fitted to `model`."""
    shapes = build_on_meta(deepcopy(model.config), model.dtype)
    base = ModelConfig(config=model.config, key_mapping=None)
    return fit(open_adapter(directory, allow_pickle=False), shapes, base).adapter


def put_back(model: PreTrainedModel, directory: Path, *, trainable: bool = True) -> PeftModel:
    """Return `model` with the adapter in `directory`."""
    return load_adapter(model, read_for(model, directory), trainable=trainable)


def assert_loads_again(model: PeftModel, checkpoint: Path, directory: Path, **flags: object) -> None:
    """Save the adapter of `model`, put it on a fresh base, and compare the logits to the bit."""
    save_adapter(model, directory)
    reloaded = put_back(load(checkpoint, **flags).base, directory)
    assert torch.equal(logits(reloaded, IDS), logits(model, IDS))
