"""Express an adapter as changes of its base's parameters. Its values stay in their file until they are used."""

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
    AddedVector,
    DoraChange,
    ExpertUpdate,
    LowRankUpdate,
    ReplacedParameter,
    RowUpdate,
    WeightChange,
    WholeParameter,
)
from qlora_cli.model_files.model_config import ModelConfig

Read = Callable[[str], torch.Tensor]
# A parameter of a module by its name in it, its change, and the keys of the adapter's tensors for it.
ParameterChange = tuple[str, WeightChange, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class AdapterChanges:
    """The changes of one adapter, by the full name of the parameter.

    Attributes:
        adapter: The adapter, fitted to the base.
        base_parameters: Parameters of the base for which its file holds other values, by their names in the base.
    """

    adapter: Adapter
    base_parameters: Mapping[str, torch.Tensor]
    changes: Mapping[str, WeightChange]
    summary: str

    @property
    def directory(self) -> Path:
        """The directory of the adapter."""
        return self.adapter.directory

    @property
    def config(self) -> LoraConfig:
        """Its config for PEFT on this base."""
        return self.adapter.lora

    @property
    def num_tensors(self) -> int:
        """The number of its tensors."""
        return len(self.adapter.values)


def read_changes(model: PreTrainedModel, base: ModelConfig, stored: StoredAdapter, read: Read) -> AdapterChanges:
    """Return the changes of an adapter to `model`, which is on the meta device; `read` returns weights of the base.

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
        changes[name] = (
            ReplacedParameter(values=values, change=changes[name])
            if name in changes
            else WholeParameter(values=values)
        )
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
    config = stored.config.non_null
    if config.get("layer_replication"):
        return "it repeats layers of its base (layer_replication)", "Save the model with the repeated layers first."
    if config.get("alora_invocation_tokens"):
        return "it is active from its invocation tokens on only (aLoRA)", "Serve it as an adapter."
    for one in fields(LoraConfig):
        # An empty config of a variant still selects it.
        is_used = one.metadata.get("is_lora_variant") and config.get(one.name) not in (None, False, [])
        if is_used and one.name != "use_dora":
            return f"it is a variant of LoRA ({one.name})", BY_PEFT
    return None


def _is_same(values: torch.Tensor, stored: torch.Tensor) -> bool:
    return values.shape == stored.shape and torch.equal(values.to(stored.dtype), stored)


def _changes(
    adapted: PeftModel, state: Mapping[str, torch.Tensor], directory: Path
) -> Iterator[tuple[str, WeightChange]]:
    """Yield each parameter that the adapter changes, by its full name in the base, with its change."""
    read = set()
    for path, module in adapted.named_modules(remove_duplicate=False):
        parameter_changes: Iterator[ParameterChange] = iter(())
        if isinstance(module, LoraLayer):
            parameter_changes = _layer_changes(path, module, state, directory)
        elif isinstance(module, ModulesToSaveWrapper):
            parameter_changes = _whole_module_changes(path, module, state)
        elif isinstance(module, TrainableTokensWrapper):
            parameter_changes = _row_changes(path, module, state, adapted)
        for name, change, keys in parameter_changes:
            read |= set(keys)
            yield f"{in_base(path)}.{name}", change
    assert read == state.keys(), "a tensor of the adapter was not used"


def _layer_changes(
    path: str, layer: LoraLayer, state: Mapping[str, torch.Tensor], directory: Path
) -> Iterator[ParameterChange]:
    base = layer.get_base_layer()
    keys: tuple[str, ...] = (f"{path}.lora_B.weight", f"{path}.lora_A.weight")
    if isinstance(layer, ParamWrapper):
        yield layer.parameter_name, _expert_change(layer, state, keys), keys
        return
    if isinstance(layer, Embedding):
        keys = (f"{path}.lora_embedding_B", f"{path}.lora_embedding_A")
    elif not isinstance(layer, Linear):
        raise ModelError(
            f"the adapter in {directory} is on {path.removeprefix(BASE)}, a {type(base).__name__}, which only "
            "PEFT merges",
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
        change = DoraChange(update=update, magnitude=state[keys[2]])
    yield "weight", change, keys
    if not isinstance(layer, Embedding) and layer.lora_bias[ADAPTER]:
        key = f"{path}.lora_B.bias"
        if base.bias is None:
            raise ModelError(
                f"the adapter in {directory} adds a bias to {path.removeprefix(BASE)}, which has none",
                hint="Serve it as an adapter.",
            )
        yield "bias", AddedVector(values=state[key], scale=layer.scaling[ADAPTER]), (key,)


def _expert_change(layer: ParamWrapper, state: Mapping[str, torch.Tensor], keys: tuple[str, ...]) -> WeightChange:
    left, right, scale = state[keys[0]], state[keys[1]], layer.scaling[ADAPTER]
    if layer.num_experts == 1:
        return LowRankUpdate(left=left, right=right, scale=scale)
    return ExpertUpdate(
        left=left,
        right=right,
        scale=scale,
        num_experts=layer.num_experts,
        is_transposed=not layer._did_swap_in_out_features,
    )


def _whole_module_changes(
    path: str, wrapper: ModulesToSaveWrapper, state: Mapping[str, torch.Tensor]
) -> Iterator[ParameterChange]:
    for name, _ in wrapper.original_module.named_parameters():
        key = f"{path}.{name}"
        yield name, WholeParameter(values=state[key]), (key,)


def _row_changes(
    path: str, wrapper: TrainableTokensWrapper, state: Mapping[str, torch.Tensor], adapted: PeftModel
) -> Iterator[ParameterChange]:
    layer = wrapper.token_adapter
    owner = path
    if layer.tied_adapter is not None:  # tied to the embedding, whose rows these are
        (owner,) = [
            other
            for other, module in adapted.named_modules()
            if isinstance(module, TrainableTokensWrapper) and module.token_adapter is layer.tied_adapter
        ]
    key = f"{owner}.token_adapter.trainable_tokens_delta"
    yield "weight", RowUpdate(indices=tuple(layer.token_indices[ADAPTER]), values=state[key]), (key,)


def _summary(config: LoraConfig, changes: Mapping[str, WeightChange]) -> str:
    variant = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    more = [name for name, kind in (("whole modules", WholeParameter), ("rows", RowUpdate)) if _has(changes, kind)]
    return " and ".join([f"{variant} of rank {config.r}", *more])


def _has(changes: Mapping[str, WeightChange], kind: type[WeightChange]) -> bool:
    return any(isinstance(change, kind) for change in changes.values())
