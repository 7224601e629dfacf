"""Modules that train whole with an adapter, in fp32, and are saved with it: PEFT's `modules_to_save`, checked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.adapters.targets import ADAPTER, BASE, named
from qlora_cli.errors import ModelError
from qlora_cli.quantization.embedding import embedding_of, is_tied, vocabulary_modules
from qlora_cli.quantization.methods import is_quantized_layer, restores_weight

SETTING = "lora.modules_to_save"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, kw_only=True)
class WholeModules:
    """What trains whole: full names, the `ends` that PEFT finds them by, and whether head and embedding are one."""

    names: tuple[str, ...]
    ends: tuple[str, ...]
    is_tied: bool


def find_whole_modules(
    model: PreTrainedModel, asked: Sequence[str], adapted: Collection[str], rows: Collection[str]
) -> WholeModules:
    """Return the modules of `model` that `asked` are names, or ends of names, of.

    `adapted` are the full names of what gets an adapter, and `rows` the names of embeddings that train some rows.

    Raises:
        ModelError: a name matches nothing, or what can't be trained whole.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if rows and is_tied(model):  # the rows are those of both
        rows = _leaves(vocabulary_modules(model))
    found: dict[str, None] = {}
    ends: dict[str, None] = {}
    for end in asked:
        matches = named(modules, [end])
        if not matches:
            raise ModelError(
                f"{end!r} matches no module of the model",
                hint=f"Its modules are {', '.join(_leaves(modules))}.",
                setting=SETTING,
            )
        for name in matches:
            _check_trainable(name, modules[name])
            _check_overlap(name, adapted, rows)
        found |= dict.fromkeys(matches)
        # PEFT goes by the end of a string, not of a name: `norm` would be input_layernorm too.
        is_exact = [name for name in modules if name.endswith(end)] == matches
        ends |= dict.fromkeys([end] if is_exact else matches)
    for name in found:
        if inside := [other for other in found if name.startswith(f"{other}.")]:
            raise ModelError(
                f"{name} is a part of {inside[0]}, which trains whole",
                hint="Leave it out.",
                setting=SETTING,
            )
    _check_on_host(model, [modules[name] for name in found])
    return _tied_together(model, tuple(found), tuple(ends))


def _leaves(names: Collection[str]) -> list[str]:
    return sorted({leaf for name in names if (leaf := name.rpartition(".")[2]) and not leaf.isdigit()})


def _check_trainable(name: str, module: nn.Module) -> None:
    if isinstance(module, CONTAINERS):
        raise ModelError(
            f"{name} is a {type(module).__name__}, which holds modules and is none that runs",
            hint="Name the modules in it.",
            setting=SETTING,
        )
    if any(is_quantized_layer(part) or restores_weight(part) for part in module.modules()):
        raise ModelError(
            f"{name} is stored quantized, and codes can't be trained",
            hint=f"Keep it unquantized with --set quantization.skip_modules={name.rpartition('.')[2]}, or give it an "
            "adapter instead.",
            setting=SETTING,
        )
    if next(module.parameters(), None) is None:
        raise ModelError(f"{name} has nothing to train", hint="Leave it out.", setting=SETTING)


def _check_overlap(name: str, adapted: Collection[str], rows: Collection[str]) -> None:
    if both := [other for other in adapted if f"{other}.".startswith(f"{name}.")]:
        raise ModelError(
            f"{name} would train whole, and {both[0]} has an adapter",
            hint="Leave it out, or name lora.target_modules without it.",
            setting=SETTING,
        )
    if name.rpartition(".")[2] in rows:
        raise ModelError(
            f"{name} would train whole, and the rows of --new-tokens are in it",
            hint="Leave one of them out.",
            setting=SETTING,
        )


def _check_on_host(model: PreTrainedModel, found: list[nn.Module]) -> None:
    head, embedding = model.get_output_embeddings(), embedding_of(model)
    is_apart = head is not None and embedding.weight.device != head.weight.device
    if is_apart and embedding in found:
        raise ModelError(
            "an embedding that is kept in host memory can't be trained whole",
            hint="Leave --offload-embedding or lora.modules_to_save out.",
            setting=SETTING,
        )


def _tied_together(model: PreTrainedModel, names: tuple[str, ...], ends: tuple[str, ...]) -> WholeModules:
    """Return the modules, with head and embedding as one where they are one in the base."""
    pair = vocabulary_modules(model).keys()
    if not pair & set(names) or not is_tied(model):
        return WholeModules(names=names, ends=ends, is_tied=False)
    if unknown := sorted(name for name in pair if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES):
        raise ModelError(
            f"{' and '.join(sorted(pair))} are one weight, which PEFT would train as two: it "
            f"does not know {unknown[0]} by that name",
            hint="Leave it out.",
            setting=SETTING,
        )
    embedding = next(name for name, module in vocabulary_modules(model).items() if module is embedding_of(model))
    others = [name for name in names if name not in pair]
    return WholeModules(
        names=(*sorted(pair), *others),
        ends=(embedding, *(end for end in ends if named(others, [end]))),
        is_tied=True,
    )


def train_in_fp32(model: PeftModel) -> None:
    """Hold what trains whole in fp32, and hand on what it computes in the dtype that the base computes in."""
    for _, wrapper in whole_modules(model):
        module = wrapper.modules_to_save[ADAPTER]
        dtypes = {p.dtype for p in wrapper.original_module.parameters() if p.is_floating_point()}
        module.to(torch.float32)
        if dtypes != {torch.float32}:
            _compute_as_before(module, dtypes.pop())


def whole_modules(model: PeftModel) -> list[tuple[str, ModulesToSaveWrapper]]:
    """Return the modules of `model` that train whole, by full name in the base."""
    return [
        (name.removeprefix(BASE), module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ModulesToSaveWrapper)
    ]


def _compute_as_before(module: nn.Module, dtype: torch.dtype) -> None:
    def to_fp32(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if any(torch.is_autocast_enabled(device_type) for device_type in ("cuda", "cpu")):  # casts by itself
            return args, kwargs
        return tuple(map(_to_fp32, args)), {key: _to_fp32(value) for key, value in kwargs.items()}

    def as_before(_: nn.Module, __: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, torch.Tensor) else output

    module.register_forward_pre_hook(to_fp32, with_kwargs=True)
    module.register_forward_hook(as_before)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
