"""An adapter as changes of the parameters of its base, by PEFT's own reading of its config.

PEFT puts the adapter on the base on the meta device: what it wraps, with which rank and scale, is what the adapter was
trained as. Its values stay in their file, mapped into memory, until they are used.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import SAME_BASE, check_adapter_file
from qlora_cli.adapters.targets import ADAPTER, BASE
from qlora_cli.errors import ModelError
from qlora_cli.merging.changes import Added, Change, Directed, Experts, LowRank, Replaced, Rows, Whole
from qlora_cli.merging.names import ends_of, in_base, with_twins
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.config import ModelConfig

Read = Callable[[str], torch.Tensor]
# A parameter of a module by its name there, its change, and the adapter's tensors that say so.
Found = tuple[str, Change, tuple[str, ...]]
# Beginnings that take something out of the base, which is gone unless the adapter was converted when it was saved.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
COPIES = re.compile(r"\.(original_module|modules_to_save)\.")
BY_PEFT = "Merge it with PEFT's own merge_and_unload()."


@dataclass(frozen=True, kw_only=True)
class AdapterChanges:
    """What one adapter does: its changes by the full name of the parameter.

    Attributes:
        config: As PEFT reads it, without dropout.
        state: Its values, by the names that PEFT has for them on this base.
        beside: Embedding and head that were saved beside it and are not those of the base, by their names there.
    """

    directory: Path
    config: LoraConfig
    state: Mapping[str, torch.Tensor]
    beside: Mapping[str, torch.Tensor]
    changes: Mapping[str, Change]
    summary: str

    @property
    def num_tensors(self) -> int:
        """How many tensors it consists of."""
        return len(self.state)


def read_changes(
    model: PreTrainedModel, base: ModelConfig, directory: Path, stored: Read, *, allow_pickle: bool
) -> AdapterChanges:
    """Return what the adapter in `directory` does to `model`, which is on the meta device; `stored` reads its weights.

    Raises:
        ModelError: it is no LoRA adapter, does not fit the model, can't be merged, or holds what is no number.
    """
    check_adapter_file(directory)
    config = _read_config(directory)
    state = _of_decoder(_read_state(directory, allow_pickle=allow_pickle), base, directory)
    ends = {name: model.get_parameter(name) for name in ends_of(model)}
    tied = dict(model.all_tied_weights_keys or {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of tied weights and stored orders, which are seen to here
            warnings.simplefilter("ignore", RuntimeWarning)
            adapted = get_peft_model(model, deepcopy(config), autocast_adapter_dtype=False)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the adapter in {directory} can't be put on its base: {reason}", hint=SAME_BASE) from error
    state, beside = _checked(adapted, config, state, ends, directory)
    # PEFT puts them into the base, where those that are one stay one.
    twins = with_twins(beside, tied)
    beside = {name: beside[twin] for name, twin in twins.items() if not _is_same(beside[twin], stored(name))}
    changes = dict(_changes(adapted, state, directory))
    for name, values in beside.items():
        changes[name] = Replaced(values=values, change=changes[name]) if name in changes else Whole(values=values)
    if not changes:
        raise ModelError(f"the adapter in {directory} changes nothing", hint="Train it first.")
    return AdapterChanges(
        directory=directory,
        config=config,
        state=state,
        beside=beside,
        changes=changes,
        summary=_summary(config, changes),
    )


def _read_config(directory: Path) -> LoraConfig:
    content = read_json(directory / ADAPTER_CONFIG)
    init = content.get("init_lora_weights")
    # How it began is past; PEFT would want what it began with, such as scipy for LoftQ.
    content |= {"init_lora_weights": True, "loftq_config": {}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_peft_type(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the config of the adapter in {directory} can't be read: {error}", hint=SAME_BASE) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"the adapter in {directory} is {config.peft_type.value}, not LoRA", hint=BY_PEFT)
    if reason := _not_mergeable(config, init):
        raise ModelError(f"the adapter in {directory} can't be merged: {reason[0]}", hint=reason[1])
    config.lora_dropout = 0.0  # of training only
    return config


def _not_mergeable(config: LoraConfig, init: object) -> tuple[str, str] | None:
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        return (
            f"it began by {init}, which changed its base, and says nothing of the base as it was",
            "Of a run, merge its adapter/, which was converted; else save it with "
            "path_initial_model_for_weight_conversion.",
        )
    if config.layer_replication:
        return "it repeats layers of its base (layer_replication)", "Save the model with the repeated layers first."
    if config.alora_invocation_tokens:
        return "it is active from its invocation tokens on only (aLoRA)", "Serve it as an adapter."
    for one in fields(config):
        if one.metadata.get("is_lora_variant") and one.name != "use_dora" and getattr(config, one.name):
            return f"it is of a kind of its own ({one.name})", BY_PEFT
    return None


def _read_state(directory: Path, *, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if (directory / ADAPTER_WEIGHTS).is_file():
        return load_file(directory / ADAPTER_WEIGHTS)
    assert allow_pickle, "refused when it was found"
    state: dict[str, torch.Tensor] = torch.load(directory / ADAPTER_PICKLE, map_location="cpu", weights_only=True)
    return state


def _of_decoder(state: dict[str, torch.Tensor], base: ModelConfig, directory: Path) -> dict[str, torch.Tensor]:
    """Return the values by the names of the text decoder, where the adapter was put on a model with towers around it.

    On towers it may be, as long as it does nothing there: training on text alone leaves it so.
    """
    if not base.text_only:
        return state
    towers = {key: value for key, value in state.items() if base.is_left_out(key)}
    trained = [key for key, value in towers.items() if "lora_A" not in key and value.any()]
    if trained:
        raise ModelError(
            f"the adapter in {directory} changes more than the text decoder: {in_base(trained[0])}", hint=BY_PEFT
        )
    kept = {key.removeprefix(BASE): value for key, value in state.items() if key not in towers}
    return {f"{BASE}{base.renamed(name)}": value for name, value in kept.items()}


def _is_same(values: torch.Tensor, stored: torch.Tensor) -> bool:
    return values.shape == stored.shape and torch.equal(values.to(stored.dtype), stored)


def _is_copy(key: str, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a weight is that of a module that trained whole, or of its base, once more.

    PEFT writes both beside it if it takes them for an embedding that was resized.
    """
    plain = COPIES.sub(".", key)
    return plain != key and plain in state


def _checked(
    adapted: PeftModel,
    config: LoraConfig,
    state: dict[str, torch.Tensor],
    ends: Mapping[str, torch.Tensor],
    directory: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the values by the names that PEFT expects, every one, and those of `ends` that were saved beside.

    Those are embedding and head, which PEFT saves unasked, by their names in the base.
    """
    # Given the state, PEFT does not take the biases of LoRA layers for shards of something.
    expected = get_peft_model_state_dict(adapted, adapted.state_dict(), save_embedding_layers=False)
    if state.keys() != expected.keys():
        state = convert_peft_adapter_state_dict_for_transformers(adapted, config, state)
    state = {key: value for key, value in state.items() if not key.startswith(_followers(adapted))}
    state = {key: value for key, value in state.items() if not _is_copy(key, state)}
    beside = {key: in_base(key) for key in state if key not in expected and in_base(key) in ends}
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(
            f"the adapter in {directory} lacks {len(missing)} of its weights, such as {missing[0]}", hint=SAME_BASE
        )
    if unknown := sorted(state.keys() - expected.keys() - beside.keys()):
        raise ModelError(
            f"the adapter in {directory} has {len(unknown)} weights that the base has no place for, such as "
            f"{unknown[0]}",
            hint=SAME_BASE,
        )
    for key, value in state.items():
        _check_value(key, value, ends[beside[key]] if key in beside else expected[key], directory)
    return {key: state[key] for key in expected}, {name: state[key] for key, name in beside.items()}


def _followers(adapted: PeftModel) -> tuple[str, ...]:
    """Return where the names of tied heads begin whose rows are those of the embedding; PEFT may save them twice."""
    return tuple(
        f"{path}."
        for path, module in adapted.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None
    )


def _check_value(key: str, value: torch.Tensor, expected: torch.Tensor, directory: Path) -> None:
    if value.shape != expected.shape:
        raise ModelError(
            f"the adapter in {directory}: {key} is {tuple(value.shape)}, and the base asks for "
            f"{tuple(expected.shape)}",
            hint=SAME_BASE,
        )
    if not torch.isfinite(value).all():
        raise ModelError(
            f"the adapter in {directory} is broken: {key} holds NaN or infinite values",
            hint="Take an earlier checkpoint of the run.",
        )


def _changes(adapted: PeftModel, state: Mapping[str, torch.Tensor], directory: Path) -> Iterator[tuple[str, Change]]:
    """Yield each parameter that the adapter changes, by its full name in the base, and how."""
    read = set()
    for path, module in adapted.named_modules(remove_duplicate=False):
        found: Iterator[Found] = iter(())
        if isinstance(module, LoraLayer):
            found = _of_layer(path, module, state, directory)
        elif isinstance(module, ModulesToSaveWrapper):
            found = _of_whole(path, module, state)
        elif isinstance(module, TrainableTokensWrapper):
            found = _of_rows(path, module, state, adapted)
        for name, change, keys in found:
            read |= set(keys)
            yield f"{in_base(path)}.{name}", change
    for key in sorted(state.keys() - read):  # biases that were trained beside (bias="all")
        yield in_base(key), Whole(values=state[key])


def _of_layer(path: str, layer: LoraLayer, state: Mapping[str, torch.Tensor], directory: Path) -> Iterator[Found]:
    base = layer.get_base_layer()
    keys: tuple[str, ...] = (f"{path}.lora_B.weight", f"{path}.lora_A.weight")
    if isinstance(layer, ParamWrapper):
        yield layer.parameter_name, _of_experts(layer, state, keys), keys
        return
    if isinstance(layer, Embedding):
        keys = (f"{path}.lora_embedding_B", f"{path}.lora_embedding_A")
    elif not isinstance(layer, Linear):
        raise ModelError(
            f"the adapter in {directory} is on {path.removeprefix(BASE)}, a {type(base).__name__}, which is merged by "
            "PEFT only",
            hint=BY_PEFT,
        )
    update = LowRank(
        left=state[keys[0]],
        right=state[keys[1]],
        scale=layer.scaling[ADAPTER],
        is_transposed=isinstance(layer, Embedding) or layer.fan_in_fan_out,
    )
    change: Change = update
    if layer.use_dora[ADAPTER]:
        keys = (*keys, f"{path}.lora_magnitude_vector")
        change = Directed(update=update, magnitude=state[keys[2]])
    yield "weight", change, keys
    if not isinstance(layer, Embedding) and layer.lora_bias[ADAPTER]:
        key = f"{path}.lora_B.bias"
        if base.bias is None:
            raise ModelError(
                f"the adapter in {directory} adds a bias to {path.removeprefix(BASE)}, which has none",
                hint="Serve it as an adapter.",
            )
        yield "bias", Added(values=state[key], scale=layer.scaling[ADAPTER]), (key,)


def _of_experts(layer: ParamWrapper, state: Mapping[str, torch.Tensor], keys: tuple[str, ...]) -> Change:
    left, right, scale = state[keys[0]], state[keys[1]], layer.scaling[ADAPTER]
    if layer.num_experts == 1:
        return LowRank(left=left, right=right, scale=scale)
    return Experts(
        left=left,
        right=right,
        scale=scale,
        num_experts=layer.num_experts,
        is_transposed=not layer._did_swap_in_out_features,
    )


def _of_whole(path: str, wrapper: ModulesToSaveWrapper, state: Mapping[str, torch.Tensor]) -> Iterator[Found]:
    for name, _ in wrapper.original_module.named_parameters():
        key = f"{path}.{name}"
        yield name, Whole(values=state[key]), (key,)


def _of_rows(
    path: str, wrapper: TrainableTokensWrapper, state: Mapping[str, torch.Tensor], adapted: PeftModel
) -> Iterator[Found]:
    layer = wrapper.token_adapter
    owner = path
    if layer.tied_adapter is not None:  # to the embedding, whose rows these are too
        (owner,) = [
            other
            for other, module in adapted.named_modules()
            if isinstance(module, TrainableTokensWrapper) and module.token_adapter is layer.tied_adapter
        ]
    key = f"{owner}.token_adapter.trainable_tokens_delta"
    yield "weight", Rows(indices=tuple(layer.token_indices[ADAPTER]), values=state[key]), (key,)


def _summary(config: LoraConfig, changes: Mapping[str, Change]) -> str:
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    others = [name for name, there in (("whole modules", Whole), ("rows", Rows)) if _has(changes, there)]
    return " and ".join([f"{kind} of rank {config.r}", *others])


def _has(changes: Mapping[str, Change], kind: type[Change]) -> bool:
    return any(isinstance(change, kind) for change in changes.values())
