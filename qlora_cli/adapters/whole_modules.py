"""Modules that are trained whole, in fp32, and saved with an adapter: PEFT's `modules_to_save`, checked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.adapters.targets import ADAPTER, BASE, names_ending_in
from qlora_cli.errors import ModelError
from qlora_cli.quantization.embedding import embedding_of, is_tied, vocabulary_modules
from qlora_cli.quantization.methods import is_quantized_layer, restores_weight

SETTING = "lora.modules_to_save"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, kw_only=True)
class WholeModules:
    """Modules trained whole: full names, `suffixes` for PEFT, and whether they are a tied head and embedding."""

    names: tuple[str, ...]
    suffixes: tuple[str, ...]
    is_tied: bool


def find_whole_modules(
    model: PreTrainedModel, asked: Sequence[str], adapted: Collection[str], rows: Collection[str]
) -> WholeModules:
    """Return the modules of `model` that match `asked`, names or suffixes of names.

    `adapted` are the full names of modules with an adapter, `rows` the names of embeddings with trained rows.

    Raises:
        ModelError: a name matches nothing, or something that can't be trained whole.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if rows and is_tied(model):  # trained rows are in both
        rows = _leaves(vocabulary_modules(model))
    whole: dict[str, None] = {}
    suffixes: dict[str, None] = {}
    for end in asked:
        matches = names_ending_in(modules, [end])
        if not matches:
            raise ModelError(
                f"{end!r} matches no module of the model",
                hint=f"Its modules are {', '.join(_leaves(modules))}.",
                setting=SETTING,
            )
        for name in matches:
            _check_trainable(name, modules[name])
            _check_overlap(name, adapted, rows)
        whole |= dict.fromkeys(matches)
        # PEFT matches the end of the string, not of a dotted name: `norm` would match input_layernorm.
        is_exact = [name for name in modules if name.endswith(end)] == matches
        suffixes |= dict.fromkeys([end] if is_exact else matches)
    for name in whole:
        if inside := [other for other in whole if name.startswith(f"{other}.")]:
            raise ModelError(
                f"{name} is a part of {inside[0]}, which is trained whole",
                hint="Leave it out.",
                setting=SETTING,
            )
    _check_on_host(model, [modules[name] for name in whole])
    return _tied_together(model, tuple(whole), tuple(suffixes))


def _leaves(names: Collection[str]) -> list[str]:
    return sorted({leaf for name in names if (leaf := name.rpartition(".")[2]) and not leaf.isdigit()})


def _check_trainable(name: str, module: nn.Module) -> None:
    if isinstance(module, CONTAINERS):
        raise ModelError(
            f"{name} is a {type(module).__name__}, a container of modules without a forward pass",
            hint="Name the modules in it.",
            setting=SETTING,
        )
    if any(is_quantized_layer(part) or restores_weight(part) for part in module.modules()):
        raise ModelError(
            f"{name} is stored quantized, and codes can't be trained",
            hint=f"Leave it unquantized with --set quantization.skip_modules={name.rpartition('.')[2]}, or give it an "
            "adapter instead.",
            setting=SETTING,
        )
    if next(module.parameters(), None) is None:
        raise ModelError(f"{name} has nothing to train", hint="Leave it out.", setting=SETTING)


def _check_overlap(name: str, adapted: Collection[str], rows: Collection[str]) -> None:
    if both := [other for other in adapted if f"{other}.".startswith(f"{name}.")]:
        raise ModelError(
            f"{name} would be trained whole, and {both[0]} has an adapter",
            hint="Leave it out, or name lora.target_modules without it.",
            setting=SETTING,
        )
    if name.rpartition(".")[2] in rows:
        raise ModelError(
            f"{name} would be trained whole, and the rows of --new-tokens are in it",
            hint="Leave one of them out.",
            setting=SETTING,
        )


def _check_on_host(model: PreTrainedModel, whole: list[nn.Module]) -> None:
    head, embedding = model.get_output_embeddings(), embedding_of(model)
    is_apart = head is not None and embedding.weight.device != head.weight.device
    if is_apart and embedding in whole:
        raise ModelError(
            "an embedding in host memory can't be trained whole",
            hint="Leave --offload-embedding or lora.modules_to_save out.",
            setting=SETTING,
        )


def _tied_together(model: PreTrainedModel, names: tuple[str, ...], suffixes: tuple[str, ...]) -> WholeModules:
    """Return the modules, with head and embedding tied if they are tied in the base."""
    pair = vocabulary_modules(model).keys()
    if not pair & set(names) or not is_tied(model):
        return WholeModules(names=names, suffixes=suffixes, is_tied=False)
    if unknown := sorted(name for name in pair if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES):
        raise ModelError(
            f"{' and '.join(sorted(pair))} are tied, and PEFT would train them separately: it "
            f"does not know {unknown[0]} by that name",
            hint="Leave it out.",
            setting=SETTING,
        )
    embedding = next(name for name, module in vocabulary_modules(model).items() if module is embedding_of(model))
    rest = [name for name in names if name not in pair]
    return WholeModules(
        names=(*sorted(pair), *rest),
        suffixes=(embedding, *(suffix for suffix in suffixes if names_ending_in(rest, [suffix]))),
        is_tied=True,
    )


def train_in_fp32(model: PeftModel) -> None:
    """Hold modules trained whole in fp32, and cast their outputs to the dtype of the base."""
    for _, wrapper in whole_modules(model):
        module = wrapper.modules_to_save[ADAPTER]
        dtypes = {p.dtype for p in wrapper.original_module.parameters() if p.is_floating_point()}
        module.to(torch.float32)
        if dtypes != {torch.float32}:
            _compute_in_fp32(module, dtypes.pop())


def whole_modules(model: PeftModel) -> list[tuple[str, ModulesToSaveWrapper]]:
    """Return the modules of `model` that are trained whole, by full name in the base."""
    return [
        (name.removeprefix(BASE), module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ModulesToSaveWrapper)
    ]


def _compute_in_fp32(module: nn.Module, dtype: torch.dtype) -> None:
    def to_fp32(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if any(torch.is_autocast_enabled(device_type) for device_type in ("cuda", "cpu")):  # casts by itself
            return args, kwargs
        return tuple(map(_to_fp32, args)), {key: _to_fp32(value) for key, value in kwargs.items()}

    def to_dtype(_: nn.Module, __: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, torch.Tensor) else output

    module.register_forward_pre_hook(to_fp32, with_kwargs=True)
    module.register_forward_hook(to_dtype)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
