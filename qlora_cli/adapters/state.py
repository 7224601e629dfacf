"""The weights of an adapter in a model: compared with a file, and put back from it, value for value."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from qlora_cli.adapters.initialization import as_trained
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS

State = dict[str, torch.Tensor]


def adapter_state(model: PeftModel) -> State:
    """Return the weights of the adapter as they are saved, by the names in the file; not copied."""
    state: State = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def restore_adapter(model: PeftModel, directory: Path) -> None:
    """Give the adapter of `model` the values that were saved in `directory`, in place.

    Raises:
        ModelError: not every weight is as in the file afterwards: it is of another adapter.
    """
    saved = as_trained(model, load_file(directory / ADAPTER_WEIGHTS))
    wrong = _misfits(adapter_state(model), saved)
    if not wrong:
        set_peft_model_state_dict(model, saved, adapter_name=model.active_adapter)
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
