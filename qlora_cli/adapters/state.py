"""The tensors of an adapter in a model: collected for saving, compared with a file, and restored from it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

from qlora_cli.adapters.base_parameters import switched_parameters_in
from qlora_cli.adapters.initialization import as_trained
from qlora_cli.adapters.reader import Adapter, read_tensors
from qlora_cli.adapters.targets import BASE
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS

State = dict[str, torch.Tensor]
ORIGIN = "qlora_adapter"  # the attribute of a model with the adapter that was read from files


def set_origin(model: PeftModel, adapter: Adapter) -> None:
    """Record in `model` the files that its adapter was read from."""
    setattr(model, ORIGIN, adapter)


def origin_of(model: PeftModel) -> Adapter | None:
    """Return the files that the adapter of `model` was read from; None if it is new."""
    origin: Adapter | None = getattr(model, ORIGIN, None)
    return origin


def adapter_state(model: PeftModel, state: State | None = None) -> State:
    """Return the tensors of the adapter by PEFT's keys, not copied; `state` may be given as the whole model's."""
    switched = switched_parameters_in(model)
    return {**peft_state(model, state), **(switched.state if switched is not None else {})}


def peft_state(model: PeftModel, state: State | None = None) -> State:
    """Return the tensors that PEFT itself saves with the adapter, not copied."""
    # With an explicit state, PEFT does not mistake the biases of LoRA layers for shards.
    model_state = model.state_dict() if state is None else state
    tensors: State = get_peft_model_state_dict(model, model_state, save_embedding_layers=False)
    return tensors


@torch.no_grad()
def put_values(model: PeftModel, values: Mapping[str, torch.Tensor]) -> None:
    """Set every tensor of the adapter, by PEFT's keys.

    PEFT's own function is not used: it renames some keys a second time and then loses them.
    """
    for key, parameter in peft_state(model).items():
        parameter.copy_(values[key])


def with_file_names(state: State, origin: Adapter | None) -> State:
    """Return the tensors of an adapter under the names of the file that it came from, if any."""
    renaming = origin.renaming if origin is not None else None
    if renaming is None:
        return state
    return {f"{BASE}{renaming.in_whole(key.removeprefix(BASE))}": value for key, value in state.items()}


def read_state(model: PeftModel, directory: Path) -> State:
    """Return the adapter of `model` that was saved in `directory`, by PEFT's keys."""
    saved = read_tensors(directory / ADAPTER_WEIGHTS)
    origin = origin_of(model)
    if origin is not None and origin.renaming is not None:
        in_decoder = origin.renaming.in_decoder
        saved = {f"{BASE}{in_decoder(key.removeprefix(BASE))}": value for key, value in saved.items()}
    return as_trained(model, saved)


def restore_adapter(model: PeftModel, directory: Path) -> None:
    """Restore the adapter of `model` from `directory`, in place.

    Raises:
        ModelError: the file holds NaN or infinity, or weights differ from it afterwards: it is of another adapter.
    """
    saved = read_state(model, directory)
    wrong = _misfits(adapter_state(model), saved)
    if not wrong:
        put_values(model, saved)
        if switched := switched_parameters_in(model):
            switched.set_values(switched.by_name(saved))
        wrong = difference(adapter_state(model), saved)
    if wrong:
        raise ModelError(
            f"the adapter in {directory} can't be restored: {wrong}",
            hint="It belongs to another base, or to other lora settings.",
        )


def difference(state: State, saved: State) -> str | None:
    """Return a description of the first difference from the saved weights; None if there is none."""
    if wrong := _misfits(state, saved):
        return wrong
    for name, tensor in state.items():
        if not torch.equal(tensor.detach().to(saved[name]).cpu(), saved[name]):
            return f"{name} has other values"
    return None


def _misfits(state: State, saved: State) -> str | None:
    """Return a description of the first name or shape that differs from the saved ones; None if none does."""
    if missing := sorted(state.keys() - saved.keys()):
        return f"{missing[0]} is missing"
    if unknown := sorted(saved.keys() - state.keys()):
        return f"there is no {unknown[0]} in the model"
    for name, tensor in state.items():
        if tensor.shape != saved[name].shape:
            return f"{name} is {tuple(saved[name].shape)}, and {tuple(tensor.shape)} in the model"
    return None
