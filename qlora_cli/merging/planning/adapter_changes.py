"""An adapter as changes of the parameters of its base. Its values stay in their file until they are used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel

from qlora_cli.adapters.keys import in_base
from qlora_cli.adapters.reader import BY_PEFT, INITIALIZED_BY_PEFT, Adapter, StoredAdapter, changed_base, fit
from qlora_cli.adapters.targets import ADAPTER, BASE
from qlora_cli.errors import ModelError
from qlora_cli.merging.planning.weight_changes import (
    Added,
    Directed,
    Experts,
    LowRankUpdate,
    Replaced,
    RowUpdate,
    WeightChange,
    Whole,
)
from qlora_cli.model_files.model_config import ModelConfig

Read = Callable[[str], torch.Tensor]
# A parameter of a module by its name there, its change, and the adapter's tensors that say so.
Found = tuple[str, WeightChange, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class AdapterChanges:
    """What one adapter does: its changes by the full name of the parameter.

    Attributes:
        adapter: The adapter, fitted to the base.
        base_parameters: Parameters of the base that its file holds with other values, by their names there.
    """

    adapter: Adapter
    base_parameters: Mapping[str, torch.Tensor]
    changes: Mapping[str, WeightChange]
    summary: str

    @property
    def directory(self) -> Path:
        """Where it was read."""
        return self.adapter.directory

    @property
    def config(self) -> LoraConfig:
        """Its config for PEFT on this base."""
        return self.adapter.lora

    @property
    def num_tensors(self) -> int:
        """How many tensors it consists of."""
        return len(self.adapter.values)


def read_changes(model: PreTrainedModel, base: ModelConfig, stored: StoredAdapter, read: Read) -> AdapterChanges:
    """Return what an adapter does to `model`, which is on the meta device; `read` reads its weights.

    Raises:
        ModelError: it does not fit the model, or can't be merged.
    """
    _check_mergeable(stored)
    fitted = fit(stored, model, base)
    adapter, directory = fitted.adapter, stored.directory
    base_parameters = {
        name: value for name, value in adapter.base_parameters.items() if not _is_same(value, read(name))
    }
    changes = dict(_changes(fitted.model, adapter.values, directory))
    for name, values in base_parameters.items():
        changes[name] = Replaced(values=values, change=changes[name]) if name in changes else Whole(values=values)
    if not changes:
        raise ModelError(f"the adapter in {directory} changes nothing", hint="Train it first.")
    return AdapterChanges(
        adapter=adapter, base_parameters=base_parameters, changes=changes, summary=_summary(adapter.lora, changes)
    )


def _check_mergeable(stored: StoredAdapter) -> None:
    init = stored.config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(INITIALIZED_BY_PEFT):
        raise changed_base(stored.directory, init)
    if reason := _not_mergeable(stored):
        raise ModelError(f"the adapter in {stored.directory} can't be merged: {reason[0]}", hint=reason[1])


def _not_mergeable(stored: StoredAdapter) -> tuple[str, str] | None:
    given = stored.config.non_null
    if given.get("layer_replication"):
        return "it repeats layers of its base (layer_replication)", "Save the model with the repeated layers first."
    if given.get("alora_invocation_tokens"):
        return "it is active from its invocation tokens on only (aLoRA)", "Serve it as an adapter."
    for one in fields(LoraConfig):
        # An empty config of a variant is one.
        is_used = one.metadata.get("is_lora_variant") and given.get(one.name) not in (None, False, [])
        if is_used and one.name != "use_dora":
            return f"it is of a kind of its own ({one.name})", BY_PEFT
    return None


def _is_same(values: torch.Tensor, stored: torch.Tensor) -> bool:
    return values.shape == stored.shape and torch.equal(values.to(stored.dtype), stored)


def _changes(
    adapted: PeftModel, state: Mapping[str, torch.Tensor], directory: Path
) -> Iterator[tuple[str, WeightChange]]:
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
    assert read == state.keys(), "a tensor of the adapter does nothing"


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
    update = LowRankUpdate(
        left=state[keys[0]],
        right=state[keys[1]],
        scale=layer.scaling[ADAPTER],
        is_transposed=isinstance(layer, Embedding) or layer.fan_in_fan_out,
    )
    change: WeightChange = update
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


def _of_experts(layer: ParamWrapper, state: Mapping[str, torch.Tensor], keys: tuple[str, ...]) -> WeightChange:
    left, right, scale = state[keys[0]], state[keys[1]], layer.scaling[ADAPTER]
    if layer.num_experts == 1:
        return LowRankUpdate(left=left, right=right, scale=scale)
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
    yield "weight", RowUpdate(indices=tuple(layer.token_indices[ADAPTER]), values=state[key]), (key,)


def _summary(config: LoraConfig, changes: Mapping[str, WeightChange]) -> str:
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    others = [name for name, there in (("whole modules", Whole), ("rows", RowUpdate)) if _has(changes, there)]
    return " and ".join([f"{kind} of rank {config.r}", *others])


def _has(changes: Mapping[str, WeightChange], kind: type[WeightChange]) -> bool:
    return any(isinstance(change, kind) for change in changes.values())
