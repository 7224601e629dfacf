"""Find the layers and fused experts that get an adapter, by the names in the settings, and their ranks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.quantization.methods.skip_modules import fused_experts, linear_layers
from qlora_cli.settings.models import LoraSettings

ROUTER = re.compile(r"\.(router|gate|shared_expert_gate)$")
READ_BY_KERNEL = re.compile(r"\.(mamba|mixer)\.out_proj$")

PARAMETERS = "lora.target_parameters"
ADAPTER = "default"  # PEFT's name for an adapter without one
BASE = "base_model.model."  # PEFT's prefix for the base

Value = TypeVar("Value", int, float)


def is_target(config: LoraConfig, name: str) -> bool:
    """Return whether a config targets the module `name`, by PEFT's own rules; `all-linear` targets none."""
    if config.target_modules in (None, "all-linear"):
        return False
    return bool(check_target_module_exists(config, name))


def names_ending_in(names: Iterable[str], ends: Iterable[str]) -> list[str]:
    """Return those of the full `names` that equal one of `ends`, or end in one after a dot."""
    suffixes = tuple(f".{end}" for end in ends)
    return [name for name in names if f".{name}".endswith(suffixes)]


def adapted_layers(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """Return the full names of the linear layers that match `modules`, names or suffixes of targets."""
    return names_ending_in(_adaptable(model), modules)


def _adaptable(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in linear_layers(model) if module is not head and not ROUTER.search(name)]


def target_modules(model: PreTrainedModel, settings: LoraSettings) -> tuple[list[str], tuple[str, ...]]:
    """Return the target names for PEFT, and notes; `all-linear` is resolved here, since PEFT's result varies.

    Raises:
        ModelError: a target matches no linear layer, or one whose adapter could not be loaded again.
    """
    linears = _adaptable(model)
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
        notes.append(f"no adapter on {_shown(fused)}: a fused kernel reads the weight and would bypass an adapter")
    if lost_layers := [name for name in linears if _leaf(name) in lost]:
        notes.append(f"no adapter on {_shown(lost_layers)}: PEFT renames their weights on loading")
    if refused_layers := [name for name in linears if _leaf(name) in refused]:
        notes.append(
            f"no adapter on {_shown(refused_layers)}: PEFT mistakes these names for those of the experts here"
        )
    return targets, tuple(notes)


def _shown(names: list[str]) -> str:
    return f"{len(names)} layers ({', '.join(_leaves(names))}), such as {names[0]}"


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({_leaf(name) for name in names})


def _leaf(name: str) -> str:
    """Return the last part of a name; for a numbered layer, with that of its container."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _lost_on_loading(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the layers whose adapter PEFT would lose on loading: it renames weights as in older models."""
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    converted = convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(), dict.fromkeys(keys, torch.empty(0))
    )
    return [name for key, name in keys.items() if key not in converted]


def _accepted(model: PreTrainedModel, leaves: list[str]) -> tuple[list[str], list[str]]:
    """Return the names that PEFT keeps, and those that it would convert to targets among the experts."""
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
        if not names_ending_in(linears, [target]):
            raise ModelError(
                f"target module {target!r} matches no linear layer of the model",
                hint=f"Its linear layers are {', '.join(_leaves(linears))}; or use all-linear.",
            )


def target_parameters(model: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Return the full names of the fused parameters that get an adapter.

    Raises:
        ModelError: a name matches none, or they can't be adapted with these settings.
    """
    if settings.target_parameters is None:
        return []
    shapes = dict(fused_experts(model))
    known = list(shapes)
    if any(len(shape) == 2 for shape in shapes.values()):
        raise ModelError(
            f"{type(model).__name__} stores its experts concatenated, which PEFT adapts as if they were one",
            hint="Leave it out.",
            setting=PARAMETERS,
        )
    if not known:
        raise ModelError(f"{type(model).__name__} has no fused experts", hint="Leave it out.", setting=PARAMETERS)
    if settings.dropout:
        raise ModelError(
            f"{settings.dropout} can't be applied to fused experts: their update is part of the weight",
            hint="Set it to 0, or leave lora.target_parameters out.",
            setting="lora.dropout",
        )
    if settings.use_dora:
        raise ModelError(
            "can't be applied to fused experts: PEFT has no magnitudes for them",
            hint="Leave it or lora.target_parameters out.",
            setting="lora.use_dora",
        )
    if settings.init_lora_weights.needs_layers:
        raise ModelError(
            f"{settings.init_lora_weights.value} can't be applied to fused experts: it is made for the weight of one "
            "layer",
            hint="Use default or gaussian, or leave lora.target_parameters out.",
            setting="lora.init_lora_weights",
        )
    if settings.target_parameters == "all-experts":
        return known
    parameters: list[str] = []
    for target in settings.target_parameters:
        matches = names_ending_in(known, [target])
        if not matches:
            raise ModelError(
                f"{target!r} matches no fused parameter of the model",
                hint=f"They are {', '.join(_leaves(known))}; or use all-experts.",
                setting=PARAMETERS,
            )
        parameters += matches
    return parameters


def resolve_pattern(pattern: Mapping[str, Value] | None, adapted: Sequence[str], setting: str) -> dict[str, Value]:
    """Return `pattern` for PEFT; its keys are names or suffixes of the full names in `adapted`.

    If several keys match a name, the longest applies. PEFT uses the first instead, and sorts them when it saves an
    adapter: a key that yields to another for some layers is therefore replaced by the names of the rest.

    Raises:
        ModelError: a key of the setting `setting` has no effect.
    """
    resolved: dict[str, Value] = {}
    for key, value in (pattern or {}).items():
        matched = names_ending_in(adapted, [key])
        names = [name for name in matched if _longest_key(pattern or {}, name) == key]
        if not names:
            why = "has no effect: longer keys apply to all its layers" if matched else "matches no adapted layer"
            raise ModelError(
                f"{key!r} {why}",
                hint=f"Adapted are {', '.join(_leaves(adapted))}; a key is a full name or, after a dot, its end.",
                setting=setting,
            )
        resolved |= dict.fromkeys([key] if names == matched else names, value)
    return resolved


def rank_of(name: str, settings: LoraSettings) -> int:
    """Return the rank of the adapter on the layer with this full name."""
    pattern = settings.rank_pattern or {}
    key = _longest_key(pattern, name)
    return settings.rank if key is None else pattern[key]


def _longest_key(pattern: Mapping[str, Value], name: str) -> str | None:
    return max((key for key in pattern if names_ending_in([name], [key])), key=len, default=None)
