"""Attach a LoRA adapter to a frozen base: a new one, or one that was trained before."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.loading.checkpoint import read_header
from qlora_cli.loading.expert_lora import use_for_quantized_experts
from qlora_cli.loading.kept import fused_experts, linear_layers
from qlora_cli.loading.pickles import check_pickle
from qlora_cli.loading.source import ADAPTER_PICKLE, ADAPTER_WEIGHTS
from qlora_cli.settings.models import LoraSettings

ROUTER = re.compile(r"\.(router|gate|shared_expert_gate)$")
READ_BY_KERNEL = re.compile(r"\.(mamba|mixer)\.out_proj$")

SAME_BASE = "Was it trained on this base? adapter_config.json names the base it belongs to."


def attach_adapter(
    model: PreTrainedModel,
    settings: LoraSettings,
    new_token_ids: tuple[int, ...] = (),
    base_commit: str | None = None,
) -> tuple[PeftModel, tuple[str, ...]]:
    """Return `model` frozen, with LoRA matrices in fp32 on its targets, the only part that trains; and notes.

    The rows of `new_token_ids` train too, in the embedding and in a head of its own. `base_commit`, of a base from
    the hub, is recorded with the adapter.

    PEFT's `prepare_model_for_kbit_training` is not called: it would upcast norms, embedding and head to
    fp32, which costs 2 GiB on Llama-3.1-8B and gains nothing for a frozen base.

    Raises:
        ModelError: a target names no linear layer, or no fused parameter, of the model.
    """
    modules, notes = _target_modules(model, settings)
    parameters = _target_parameters(model, settings)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        revision=base_commit,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        trainable_token_indices=_trained_rows(model, new_token_ids),
        bias="none",
    )
    use_for_quantized_experts(config, model)
    model.requires_grad_(False)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    config.exclude_modules = None  # of this base only; elsewhere PEFT would say that there are no such modules
    _complete_head(model)
    return adapted, notes


def check_adapter_file(directory: Path) -> None:
    """Check that the weights of the adapter in `directory` can be read, before its base is.

    Raises:
        ModelError: they can't; names the file.
    """
    if (directory / ADAPTER_WEIGHTS).is_file():
        read_header(directory, ADAPTER_WEIGHTS)
    else:
        check_pickle(directory / ADAPTER_PICKLE)


def load_adapter(model: PreTrainedModel, directory: Path, *, trainable: bool) -> PeftModel:
    """Return `model` with the adapter in `directory`, in fp32 as far as it was saved so.

    Its file can be read, as `check_adapter_file` has seen.

    Raises:
        ModelError: the adapter does not fit the model, or its config can't be read.
    """
    try:
        config = PeftConfig.from_pretrained(directory)
        if not isinstance(config, LoraConfig):
            raise ModelError(
                f"the adapter in {directory} is {config.peft_type.value}, not LoRA",
                hint="Train a LoRA adapter on the base.",
            )
        use_for_quantized_experts(config, model)
        model.requires_grad_(False)
        with warnings.catch_warnings():
            # PEFT would go on with adapters that do nothing where it found none.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, directory, config=config, is_trainable=trainable)
            config.exclude_modules = None
            # It drops what it finds no place for, and only here says so.
            left_over = adapted.load_adapter(directory, "default", is_trainable=trainable).unexpected_keys
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        if isinstance(error, ModelError):
            raise
        reason, *more = [line.strip() for line in str(error).splitlines() if "Error(s) in loading" not in line]
        others = f" (and {len(more)} more)" if more else ""
        raise ModelError(f"the adapter in {directory} can't be attached: {reason}{others}", hint=SAME_BASE) from error
    if left_over:
        raise ModelError(
            f"the adapter in {directory} has {len(left_over)} weights that the base has no place for, such as "
            f"{left_over[0]}",
            hint=SAME_BASE,
        )
    _complete_head(model)
    return adapted


def save_adapter(model: PeftModel, directory: Path, state: dict[str, Any] | None = None) -> None:
    """Write the adapter of `model` to `directory`, with the rows that it trains and no others."""
    # By itself PEFT asks the hub whether the embedding was grown, and if so writes all of it, gigabytes.
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def _target_modules(model: PreTrainedModel, settings: LoraSettings) -> tuple[list[str], tuple[str, ...]]:
    """Return the names for PEFT, resolved: what it makes of `all-linear` differs between architectures."""
    head = model.get_output_embeddings()
    linears = [name for name, module in linear_layers(model) if module is not head and not ROUTER.search(name)]
    lost = _leaves(_lost_on_loading(model, linears))
    if settings.target_modules != "all-linear":
        _check_targets(linears, settings.target_modules)
        if renamed := sorted(set(_leaves(settings.target_modules)) & set(lost)):
            raise ModelError(
                f"an adapter on {', '.join(renamed)} could be trained, but not loaded: PEFT renames its weights",
                hint="Leave these names out of lora.target_modules.",
            )
        return list(settings.target_modules), ()
    fused = [name for name in linears if READ_BY_KERNEL.search(name)]
    targets, refused = _accepted(
        model, _leaves(name for name in linears if name not in fused and _leaf(name) not in lost)
    )
    if not targets:
        raise ModelError(f"{type(model).__name__} has no linear layer that can be adapted")
    notes = []
    if fused:
        notes.append(f"no adapter on {_shown(fused)}: a fused kernel reads the weight and would pass an adapter over")
    if lost_layers := [name for name in linears if _leaf(name) in lost]:
        notes.append(f"no adapter on {_shown(lost_layers)}: PEFT renames weights of theirs on loading")
    if taken := [name for name in linears if _leaf(name) in refused]:
        notes.append(f"no adapter on {_shown(taken)}: PEFT takes these names for those of the experts here")
    return targets, tuple(notes)


def _shown(names: list[str]) -> str:
    return f"{len(names)} layers ({', '.join(_leaves(names))}), such as {names[0]}"


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({_leaf(name) for name in names})


def _leaf(name: str) -> str:
    """Return the last part of a name that says what a layer is: of a layer with a number, its container's too."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _lost_on_loading(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the layers whose adapter PEFT would not find again: it renames weights as those of older models."""
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict.fromkeys(keys, torch.empty(0)))
    return [name for key, name in keys.items() if key not in found]


def _accepted(model: PreTrainedModel, leaves: list[str]) -> tuple[list[str], list[str]]:
    """Return the names that PEFT leaves as they are, and those it would turn into targets among the experts."""
    accepted: list[str] = []
    refused: list[str] = []
    for leaf in leaves:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one half of a fused pair
            refused.append(leaf)
            continue
        (accepted if leaf in config.target_modules else refused).append(leaf)
    return accepted, refused


def _check_targets(linears: list[str], targets: tuple[str, ...]) -> None:
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ModelError(
                f"target module {target!r} matches no linear layer of the model",
                hint=f"Its linear layers are {', '.join(_leaves(linears))}; or use all-linear.",
            )


def _target_parameters(model: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Return the full names of the fused parameters that get an adapter."""
    if settings.target_parameters is None:
        return []
    shapes = dict(fused_experts(model))
    known = list(shapes)
    if any(len(shape) == 2 for shape in shapes.values()):
        raise ModelError(
            f"{type(model).__name__} lays its experts in a row, which PEFT adapts as if they were one",
            hint="Leave lora.target_parameters out.",
        )
    if not known:
        raise ModelError(f"{type(model).__name__} has no fused experts", hint="Leave lora.target_parameters out.")
    if settings.dropout:
        raise ModelError(
            f"lora.dropout={settings.dropout} can't be applied to fused experts: their update is part of the weight",
            hint="Set lora.dropout to 0, or leave lora.target_parameters out.",
        )
    if settings.target_parameters == "all-experts":
        return known
    found: list[str] = []
    for target in settings.target_parameters:
        matches = [name for name in known if name == target or name.endswith(f".{target}")]
        if not matches:
            raise ModelError(
                f"target parameter {target!r} matches no fused parameter of the model",
                hint=f"They are {', '.join(_leaves(known))}; or use all-experts.",
            )
        found += matches
    return found


def _trained_rows(model: PreTrainedModel, ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            f"{type(model).__name__} can't train new tokens: its output head has a bias, which PEFT would drop",
            hint="Leave --new-tokens out.",
        )
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return {names[module]: list(ids) for module in modules}


def _complete_head(model: PreTrainedModel) -> None:
    # TRL's fused loss reads weight and bias of the head. PEFT's wrapper of a head with trained rows hands the weight
    # on, with those rows in it, but has no bias to say that there is none.
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = None
