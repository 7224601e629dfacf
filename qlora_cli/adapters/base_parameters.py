"""Switch the base's parameters that an adapter's file holds together with the adapter.

PEFT writes the embedding and head of an extended vocabulary, and trained biases, into an adapter's file. When it reads
them, it overwrites those of the base: disabling the adapter does not restore the base, and they are not saved again.
Here both versions are held, and swapped when PEFT enables or disables the adapter. A head that was extended for an
adapter has only the base's rows while it is disabled: the others would take part in the softmax.
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
MODULE_NAME = "qlora_switched_parameters"  # of the module that switches them


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterSlot:
    """An entry of a dictionary of parameters or modules, with its values while the adapter is on and off."""

    holder: dict[str, Any]
    leaf: str
    on: nn.Parameter | nn.Module
    off: nn.Parameter | nn.Module


class SwitchedParameters(AuxiliaryTrainingWrapper):  # type: ignore[misc] # PEFT is untyped
    """Switches parameters with the adapter, which PEFT enables and disables on its wrappers; it computes nothing.

    `live` are the parameters by their names in the base; `stored` maps PEFT's keys to those names and to the values in
    the file. Those that are not trained are saved from there, bit for bit, whatever dtype the model holds them in.
    """

    def __init__(
        self,
        slots: list[ParameterSlot],
        live: Mapping[str, nn.Parameter],
        stored: Mapping[str, tuple[str, torch.Tensor]],
        trained: frozenset[str],
    ) -> None:
        nn.Module.__init__(self)
        self.original_module = nn.Identity()
        self._active_adapter, self._disable_adapters, self._adapters = [ADAPTER], False, {ADAPTER}
        self._slots, self._live, self._stored, self._trained = slots, dict(live), stored, trained
        self.enable_adapters(True)

    def enable_adapters(self, enabled: bool) -> None:
        """Activate the values of the file, or those of the base."""
        self._disable_adapters = not enabled
        for slot in self._slots:
            slot.holder[slot.leaf] = slot.on if enabled else slot.off

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the trained parameters require gradients, or not; there is only one adapter."""
        del adapter_names
        for name in self._trained & self._live.keys():
            self._live[name].requires_grad_(not inference_mode)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Return the adapter if `adapter_name` includes it."""
        return ADAPTER if adapter_name == ADAPTER or ADAPTER in adapter_name else None

    def _get_available_adapters(self) -> set[str]:
        return {ADAPTER}

    def adapter_state_dict(self, adapter_name: str, state_dict: State) -> dict[str, torch.Tensor]:
        """Return nothing: the parameters are not saved under the name of this module. See `state`."""
        del adapter_name, state_dict
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return nothing; see `adapter_state_dict`."""
        del adapter_name
        return {}

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The values to save, by PEFT's keys."""
        return {
            key: self._live[name].detach() if name in self._trained else value
            for key, (name, value) in self._stored.items()
        }

    @property
    def frozen_bytes(self) -> int:
        """The bytes in a file of the parameters that are not trained."""
        return sum(value.nbytes for name, value in self._stored.values() if name not in self._trained)

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """The values to save, by their names in the base."""
        return self.by_name(self.state)

    def by_name(self, values: State) -> dict[str, torch.Tensor]:
        """Return the switched parameters among `values`, which are by PEFT's keys, by their names in the base."""
        return {name: values[key] for key, (name, _) in self._stored.items()}

    @torch.no_grad()
    def set_values(self, values: State) -> None:
        """Set the values of the parameters, by their names in the base."""
        for name in self._live.keys() & values.keys():
            self._live[name].copy_(values[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtendedHead:
    """The head of a base that was extended for its adapter beyond its own `num_rows` rows."""

    module: nn.Module
    num_rows: int


def switch_parameters(
    model: PeftModel,
    parameters: State,
    *,
    given: frozenset[str],
    trained: frozenset[str],
    extended: ExtendedHead | None,
) -> None:
    """Set `parameters`, by their names in the base, in `model` so that they are switched with its adapter.

    `given` are those that are saved with the adapter. Those equal to the base's are not held twice, unless trained.
    """
    modules = {
        in_base(path): (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if any(True for _ in module.parameters(recurse=False))
    }
    slots: list[ParameterSlot] = []
    live: dict[str, nn.Parameter] = {}
    shared: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for name, value in parameters.items():
        path, _, leaf = name.rpartition(".")
        _, module = modules[path]
        held = module._parameters[leaf]
        assert held is not None, "it is a parameter of the base"
        if name not in trained and _is_same(held, value):
            continue
        dtype = (
            held.dtype if held.is_floating_point() else model.get_base_model().dtype
        )  # for codes, the dtype of the model
        key = (value.data_ptr(), dtype)
        if key not in shared:  # a tied head stays tied
            shared[key] = nn.Parameter(value.to(held.device, dtype, copy=True), requires_grad=name in trained)
        held.requires_grad_(False)
        live[name] = shared[key]
        slots += _slots(model, module, leaf, live[name])
    if extended is not None:
        slots = _with_head(slots, extended)
        _mask_new_rows(model.get_base_model())
    if slots or given:
        owners = {name: name.rpartition(".") for name in given}
        stored = {f"{modules[path][0]}.{leaf}": (name, parameters[name]) for name, (path, _, leaf) in owners.items()}
        model.get_base_model().add_module(MODULE_NAME, SwitchedParameters(slots, live, stored, trained))


def switched_parameters_in(model: PeftModel) -> SwitchedParameters | None:
    """Return the base's parameters that are switched with the adapter; None if there are none."""
    switched = getattr(model.get_base_model(), MODULE_NAME, None)
    assert switched is None or isinstance(switched, SwitchedParameters)
    return switched


def _is_same(held: torch.Tensor, value: torch.Tensor) -> bool:
    return held.shape == value.shape and torch.equal(value.to(held.device, held.dtype), held)


def _with_head(slots: list[ParameterSlot], extended: ExtendedHead) -> list[ParameterSlot]:
    """Return `slots` with those of the head, which has only the base's own rows while the adapter is off."""
    holder = extended.module._parameters
    on = {slot.leaf: slot.on for slot in slots if slot.holder is holder}
    of_head = [
        ParameterSlot(
            holder=holder,
            leaf=leaf,
            on=on.get(leaf, held),
            off=nn.Parameter(held.data[: extended.num_rows], requires_grad=False),  # a view, which takes no memory
        )
        for leaf, held in holder.items()
        if held is not None
    ]
    return [*(slot for slot in slots if slot.holder is not holder), *of_head]


def _mask_new_rows(base: PreTrainedModel) -> None:
    """Make `base` return logits for all rows, `(batch, seq, vocabulary)`, even if its head has fewer.

    Logits processors index them with the ids of the prompt, which may be new ones.
    """
    num_rows = base.get_input_embeddings().weight.shape[0]  # type: ignore[index]

    def widen(_: nn.Module, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and logits.shape[-1] < num_rows:
            output.logits = F.pad(logits, (0, num_rows - logits.shape[-1]), value=float("-inf"))

    base.register_forward_hook(widen)


def _slots(model: PeftModel, module: nn.Module, leaf: str, value: nn.Parameter) -> Iterator[ParameterSlot]:
    held = module._parameters[leaf]
    if not (leaf == "weight" and is_quantized_layer(module)):
        assert held is not None, "it is a parameter of the base"
        yield ParameterSlot(holder=module._parameters, leaf=leaf, on=value, off=held)
        return
    # Codes can't be replaced by a weight, so the whole layer is replaced.
    assert isinstance(module, nn.Linear), "quantized layers are subclasses of Linear"
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain._parameters = {"weight": value, "bias": module.bias}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                yield ParameterSlot(holder=parent._modules, leaf=name, on=plain, off=module)
