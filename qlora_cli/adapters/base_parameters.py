"""Parameters of the base that an adapter's file holds: in their place while the adapter is on, and only then.

PEFT writes the embedding and head of a grown vocabulary, and trained biases, into an adapter's file. Reading them, it
overwrites those of the base: switching the adapter off does not bring the base back, and they are not saved again.
Here both are kept, and swapped when PEFT switches the adapter on or off. A head that was given rows for an adapter
has those of the base alone while it is off: the others would take part in the softmax.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import PreTrainedModel

from qlora_cli.adapters.keys import in_base
from qlora_cli.adapters.targets import ADAPTER
from qlora_cli.quantization.methods import is_quantized_layer

State = Mapping[str, torch.Tensor]
PLACE = "qlora_kept"  # the name of the module that switches them


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterSlot:
    """Where a parameter, or the module around it, is held, with what is there while the adapter is on and off."""

    holder: dict[str, Any]
    leaf: str
    on: nn.Parameter | nn.Module
    off: nn.Parameter | nn.Module


class SwitchedParameters(AuxiliaryTrainingWrapper):  # type: ignore[misc] # PEFT is untyped
    """Switches parameters with the adapter, as PEFT asks each of its wrappers to; itself it computes nothing.

    `live` are the parameters by their names in the base; `stored` are their values as the file has them, by PEFT's
    keys and those names. Those that do not train are saved so, to the bit, however the model holds them.
    """

    def __init__(
        self,
        places: list[ParameterSlot],
        live: Mapping[str, nn.Parameter],
        stored: Mapping[str, tuple[str, torch.Tensor]],
        trained: frozenset[str],
    ) -> None:
        nn.Module.__init__(self)
        self.original_module = nn.Identity()
        self._active_adapter, self._disable_adapters, self._adapters = [ADAPTER], False, {ADAPTER}
        self._places, self._live, self._stored, self._trained = places, dict(live), stored, trained
        self.enable_adapters(True)

    def enable_adapters(self, enabled: bool) -> None:
        """Put the values of the file, or those of the base, into their places."""
        self._disable_adapters = not enabled
        for place in self._places:
            place.holder[place.leaf] = place.on if enabled else place.off

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let those that train do so, or not; there is only one adapter."""
        del adapter_names
        for name in self._trained & self._live.keys():
            self._live[name].requires_grad_(not inference_mode)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Return the adapter, if it is the one that is to be active."""
        return ADAPTER if adapter_name == ADAPTER or ADAPTER in adapter_name else None

    def _get_available_adapters(self) -> set[str]:
        return {ADAPTER}

    def adapter_state_dict(self, adapter_name: str, state_dict: State) -> dict[str, torch.Tensor]:
        """Return nothing: they are not saved by the name of this module. See `state`."""
        del adapter_name, state_dict
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return nothing; see `adapter_state_dict`."""
        del adapter_name
        return {}

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What is saved of them, by PEFT's keys."""
        return {
            key: self._live[name].detach() if name in self._trained else value
            for key, (name, value) in self._stored.items()
        }

    @property
    def frozen_bytes(self) -> int:
        """What those that do not train take in a file."""
        return sum(value.nbytes for name, value in self._stored.values() if name not in self._trained)

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """What is saved of them, by their names in the base."""
        return self.by_name(self.state)

    def by_name(self, values: State) -> dict[str, torch.Tensor]:
        """Return those of `values`, which are by PEFT's keys, that are theirs, by their names in the base."""
        return {name: values[key] for key, (name, _) in self._stored.items()}

    @torch.no_grad()
    def put(self, values: State) -> None:
        """Give them values, by their names in the base."""
        for name in self._live.keys() & values.keys():
            self._live[name].copy_(values[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class GrownHead:
    """The head of a base that was given rows for its adapter, beyond the `num_rows` of its own."""

    module: nn.Module
    num_rows: int


def keep(
    model: PeftModel, kept: State, *, given: frozenset[str], trained: frozenset[str], grown: GrownHead | None
) -> None:
    """Put parameters, by their names in the base, into their places in `model`, to be switched with its adapter.

    `given` are those that are saved with it. Those that are as in the base are not held twice, unless they train.
    """
    modules = {
        in_base(path): (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if any(parameter is not None for parameter in module._parameters.values())
    }
    places: list[ParameterSlot] = []
    live: dict[str, nn.Parameter] = {}
    shared: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for name, value in kept.items():
        path, _, leaf = name.rpartition(".")
        _, module = modules[path]
        held = module._parameters[leaf]
        assert held is not None, "it is a parameter of the base"
        if name not in trained and _is_same(held, value):
            continue
        dtype = held.dtype if held.is_floating_point() else model.get_base_model().dtype  # of codes
        key = (value.data_ptr(), dtype)
        if key not in shared:  # a head that is the embedding stays so
            shared[key] = nn.Parameter(value.to(held.device, dtype, copy=True), requires_grad=name in trained)
        held.requires_grad_(False)
        live[name] = shared[key]
        places += _places(model, module, leaf, live[name])
    if grown is not None:
        places = _without_new_rows(places, grown)
        _give_new_rows_no_probability(model.get_base_model())
    if places or given:
        owners = {name: name.rpartition(".") for name in given}
        stored = {f"{modules[path][0]}.{leaf}": (name, kept[name]) for name, (path, _, leaf) in owners.items()}
        model.get_base_model().add_module(PLACE, SwitchedParameters(places, live, stored, trained))


def switched_parameters_in(model: PeftModel) -> SwitchedParameters | None:
    """Return what an adapter keeps of the base's parameters, if it does."""
    found = getattr(model.get_base_model(), PLACE, None)
    assert found is None or isinstance(found, SwitchedParameters)
    return found


def _is_same(held: torch.Tensor, value: torch.Tensor) -> bool:
    return held.shape == value.shape and torch.equal(value.to(held.device, held.dtype), held)


def _without_new_rows(places: list[ParameterSlot], grown: GrownHead) -> list[ParameterSlot]:
    """Return `places` with those of the head, which has the base's own rows alone while the adapter is off."""
    holder = grown.module._parameters
    on = {place.leaf: place.on for place in places if place.holder is holder}
    of_head = [
        ParameterSlot(
            holder=holder,
            leaf=leaf,
            on=on.get(leaf, held),
            off=nn.Parameter(held.data[: grown.num_rows], requires_grad=False),  # a view, which takes no memory
        )
        for leaf, held in holder.items()
        if held is not None
    ]
    return [*(place for place in places if place.holder is not holder), *of_head]


def _give_new_rows_no_probability(base: PreTrainedModel) -> None:
    """Make `base` give logits for all rows, (batch, seq, vocabulary), also where its head has fewer.

    What chooses tokens looks them up by ids of the prompt, which may be new ones.
    """
    num_rows = base.get_input_embeddings().weight.shape[0]  # type: ignore[index]

    def widen(_: nn.Module, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and logits.shape[-1] < num_rows:
            output.logits = F.pad(logits, (0, num_rows - logits.shape[-1]), value=float("-inf"))

    base.register_forward_hook(widen)


def _places(model: PeftModel, module: nn.Module, leaf: str, value: nn.Parameter) -> Iterator[ParameterSlot]:
    held = module._parameters[leaf]
    if not (leaf == "weight" and is_quantized_layer(module)):
        assert held is not None, "it is a parameter of the base"
        yield ParameterSlot(holder=module._parameters, leaf=leaf, on=value, off=held)
        return
    # Codes can't be replaced by a weight: the whole layer is.
    assert isinstance(module, nn.Linear), "it stands in the place of one"
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain._parameters = {"weight": value, "bias": module.bias}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                yield ParameterSlot(holder=parent._modules, leaf=name, on=plain, off=module)
