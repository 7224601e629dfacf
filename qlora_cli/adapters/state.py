"""The tensors of an adapter in a model: as they are saved, compared with a file, and put back from it."""

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
ORIGIN = "qlora_adapter"  # the attribute of a model that holds the adapter which it was given from files


def remember_origin(model: PeftModel, adapter: Adapter) -> None:
    """Keep with `model` what its adapter was read from."""
    setattr(model, ORIGIN, adapter)


def origin_of(model: PeftModel) -> Adapter | None:
    """Return what the adapter of `model` was read from; None if it is a new one."""
    found: Adapter | None = getattr(model, ORIGIN, None)
    return found


def adapter_state(model: PeftModel, state: State | None = None) -> State:
    """Return the tensors of the adapter, by PEFT's keys; not copied. `state` are all of the model, if given."""
    kept = switched_parameters_in(model)
    return {**parts_of(model, state), **(kept.state if kept is not None else {})}


def parts_of(model: PeftModel, state: State | None = None) -> State:
    """Return what PEFT itself knows as the adapter's; not copied."""
    # Given the state, PEFT does not take the biases of LoRA layers for shards of something.
    given = model.state_dict() if state is None else state
    found: State = get_peft_model_state_dict(model, given, save_embedding_layers=False)
    return found


@torch.no_grad()
def put_values(model: PeftModel, values: Mapping[str, torch.Tensor]) -> None:
    """Give every tensor of the adapter its value, by PEFT's keys.

    Not by PEFT's own way, which renames some once more and then loses them.
    """
    for key, parameter in parts_of(model).items():
        parameter.copy_(values[key])


def in_file(state: State, origin: Adapter | None) -> State:
    """Return the tensors of an adapter under the names that its file had, if it came from one."""
    renaming = origin.renaming if origin is not None else None
    if renaming is None:
        return state
    return {f"{BASE}{renaming.in_whole(key.removeprefix(BASE))}": value for key, value in state.items()}


def read_state(model: PeftModel, directory: Path) -> State:
    """Return what was saved in `directory` of the adapter of `model`, by PEFT's keys."""
    saved = read_tensors(directory / ADAPTER_WEIGHTS)
    origin = origin_of(model)
    if origin is not None and origin.renaming is not None:
        in_decoder = origin.renaming.in_decoder
        saved = {f"{BASE}{in_decoder(key.removeprefix(BASE))}": value for key, value in saved.items()}
    return as_trained(model, saved)


def restore_adapter(model: PeftModel, directory: Path) -> None:
    """Give the adapter of `model` the values that were saved in `directory`, in place.

    Raises:
        ModelError: the file holds what is no number, or not every weight is as in it afterwards: it is of another
            adapter.
    """
    saved = read_state(model, directory)
    wrong = _misfits(adapter_state(model), saved)
    if not wrong:
        put_values(model, saved)
        if kept := switched_parameters_in(model):
            kept.put(kept.by_name(saved))
        wrong = difference(adapter_state(model), saved)
    if wrong:
        raise ModelError(
            f"the adapter in {directory} can't be put back: {wrong}",
            hint="It belongs to another base, or to other lora settings.",
        )


def difference(state: State, saved: State) -> str | None:
    """Return where weights differ from those that were saved, if they do."""
    if wrong := _misfits(state, saved):
        return wrong
    for name, tensor in state.items():
        if not torch.equal(tensor.detach().to(saved[name]).cpu(), saved[name]):
            return f"{name} has other values"
    return None


def _misfits(state: State, saved: State) -> str | None:
    """Return which names or shapes are not those that were saved."""
    if missing := sorted(state.keys() - saved.keys()):
        return f"{missing[0]} is missing"
    if unknown := sorted(saved.keys() - state.keys()):
        return f"there is no {unknown[0]} in the model"
    for name, tensor in state.items():
        if tensor.shape != saved[name].shape:
            return f"{name} is {tuple(saved[name].shape)}, and {tuple(tensor.shape)} in the model"
    return None
