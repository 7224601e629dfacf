"""Check after training that the adapter is not empty, and that its files give the logits of the trained model."""

import re
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qlora_cli.adapters.base_parameters import switched_parameters_in
from qlora_cli.adapters.initialization import as_trained, is_pissa
from qlora_cli.adapters.keys import in_base
from qlora_cli.adapters.reader import fit, open_adapter
from qlora_cli.adapters.state import difference, peft_state, put_values
from qlora_cli.adapters.targets import ADAPTER
from qlora_cli.errors import TrainingError
from qlora_cli.hardware.device import device_of
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.model_files.checkpoint import read_checkpoint
from qlora_cli.quantization.embedding import vocabulary_weights
from qlora_cli.quantization.storage_plan import build_on_meta

OUTPUT = re.compile(r"\.lora_(embedding_)?B\b")
MOST_NORM = 1e6  # of one matrix: far above trained values, far below an overflow
NUM_PROBES = 16


def check_trained(model: PeftModel, never_used: Collection[str]) -> None:
    """Check that every target was trained, and that its weights are sane.

    `never_used` are layers that the model did not call, such as experts without a token.

    Raises:
        TrainingError: the adapter is entirely or partly empty, or holds values that can't be weights.
    """
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        norm = float(parameter.float().norm())
        if not norm < MOST_NORM:  # also true for NaN
            raise TrainingError(
                f"the adapter is broken: the norm of {name} is {norm}",
                hint="Lower --learning-rate. The checkpoints remain.",
            )
    outputs = {name: parameter for name, parameter in trained.items() if OUTPUT.search(name)}
    empty = [name for name, parameter in outputs.items() if not parameter.any()]
    unexpected = [name for name in empty if name.partition(".lora_")[0] not in never_used]
    if empty and (unexpected or len(empty) == len(outputs)):
        named = (unexpected or empty)[0]
        raise TrainingError(
            f"the adapter is empty: {len(empty)} of {len(outputs)} targets have learnt nothing, such as {named}",
            hint="Raise --learning-rate or --max-steps. The checkpoints remain.",
        )


@torch.no_grad()
def check_saved(model: PeftModel, directory: Path, loaded: LoadedModel) -> None:
    """Check that the saved adapter, on the base's files, gives the logits of the one in memory.

    It is read like by every command, and replaces the values in memory: a second base would not fit.

    Raises:
        TrainingError: it does not.
    """
    shapes = _shapes(model, loaded)
    vocabulary = vocabulary_weights(shapes)
    fitted = fit(open_adapter(directory, allow_pickle=False), shapes, loaded.config)
    written = as_trained(model, dict(fitted.adapter.values))
    switched = switched_parameters_in(model)
    wrong = (
        _changed_base(model, vocabulary, loaded)
        or difference(peft_state(model), written)
        or difference(
            switched.named if switched else {},
            {name: fitted.adapter.base_parameters[name] for name in fitted.adapter.in_file},
        )
        or _other_scales(model, fitted.model)
    )
    if wrong:
        raise TrainingError(f"{directory} does not hold what was trained: {wrong}", hint="The checkpoints remain.")
    was_training = model.training
    model.eval()
    num_tokens = len(loaded.tokenizer)
    before = _logits(model, num_tokens)
    noise = _distance(before, _logits(model, num_tokens))  # from kernels without a fixed order of summation
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    put_values(model, written)
    if switched:
        switched.set_values({name: torch.zeros_like(value) for name, value in switched.named.items()})
        switched.set_values(fitted.adapter.base_parameters)
    moved = _distance(before, _logits(model, num_tokens))
    model.train(was_training)
    if not moved <= noise:
        raise TrainingError(
            f"the adapter in {directory} gives other logits than the trained model: they move by {moved:.2g}",
            hint="The checkpoints remain.",
        )


def _shapes(model: PeftModel, loaded: LoadedModel) -> PreTrainedModel:
    """Return the base of `model`, with its number of rows, on the meta device."""
    config, trust = deepcopy(model.get_base_model().config), loaded.settings.model.trust_remote_code
    return build_on_meta(config, loaded.dtype.torch_dtype, trust_remote_code=trust)


def _changed_base(model: PeftModel, vocabulary: Collection[str], loaded: LoadedModel) -> str | None:
    """Describe a parameter of the base that differs from its file, since an adapter was written into it.

    Only those that an adapter's file may hold are compared: `vocabulary` (embedding and head), biases and norms.
    """
    checkpoint = read_checkpoint(loaded.source.path, allow_pickle=loaded.settings.model.allow_pickle)
    if checkpoint.is_pickle or is_pissa(model.peft_config[ADAPTER]):
        return None
    stored = {loaded.config.renamed(name): header for name, header in checkpoint.tensors.items()}
    with model.disable_adapter():
        held = {in_base(name): parameter for name, parameter in model.get_base_model().named_parameters()}
        known = held.keys() & stored.keys()
        for name in sorted(name for name in known if name in vocabulary or held[name].ndim < 2):
            header = stored[name]
            with safe_open(loaded.source.path / header.file, framework="pt") as file:
                value = file.get_tensor(header.name)
            rows = _whole(held[name])[: value.shape[0]]
            if not torch.equal(value.to(rows.device, rows.dtype), rows):
                return f"{header.name} of the base is not that of {header.file}"
    return None


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return a weight as a whole, of which processes may hold a part each."""
    moved = parameter.to(device_of(parameter))  # a part in host memory can't be sent
    return moved.full_tensor() if isinstance(moved, DTensor) else moved


def _other_scales(model: PeftModel, written: PeftModel) -> str | None:
    """Describe a layer to which the written config gives another scale, or no adapter."""
    scales, others = _scales(model), _scales(written)
    differing = sorted(path for path in scales.keys() | others.keys() if scales.get(path) != others.get(path))
    return f"its config gives another scale to {differing[0]}" if differing else None


def _scales(model: PeftModel) -> dict[str, float]:
    return {path: layer.scaling[ADAPTER] for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Return the largest difference of logits; equal infinite ones do not differ."""
    return float(torch.where(logits == others, 0.0, (logits - others).abs()).max())


def _logits(model: PeftModel, num_tokens: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(num_tokens, (1, NUM_PROBES), generator=chance).to(device_of(next(model.parameters())))
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()
