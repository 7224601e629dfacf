"""Run a model that need not fit into memory: each layer's weights are loaded before it runs, and freed afterwards.

The model is built on the meta device. A pass needs the weights of one layer at a time, and the same code runs a model
from files, the result of a planned merge, and the base with the adapter attached, as PEFT runs it.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from qlora_cli.adapters.targets import BASE
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.merging.planning.adapter_changes import AdapterChanges, Read
from qlora_cli.merging.verifying.adapted_modules import ModuleWatch
from qlora_cli.model_files.construction import build_model
from qlora_cli.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class WeightedAdapter:
    """An adapter with its weight in the sum."""

    adapter: AdapterChanges
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The module and attribute that hold a weight while a unit runs, and the weight's full name."""

    module: nn.Module
    attribute: str
    name: str


class StreamedModel:
    """A model whose weights `read` returns by full name."""

    def __init__(
        self,
        config: PreTrainedConfig,
        read: Read,
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapters: Sequence[WeightedAdapter] = (),
        watch: ModuleWatch | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Build the model; `watch` compares the adapted modules while it runs."""
        self._read, self._device, self._dtype = read, device, dtype
        self._base = _empty(config, dtype, trust_remote_code=trust_remote_code)
        self._fixed_dtypes: dict[str, torch.dtype] = self._base._get_dtype_plan(dtype)
        # By identity, since PEFT renames the modules when it attaches an adapter; valid until placeholders
        # replace the parameters.
        names = {id(parameter): name for name, parameter in self._base.named_parameters()}
        units = unit_paths(self._base)
        self._fill_saved_buffers()
        self._place_buffers()
        self._model: nn.Module = self._base
        self._replaced: Mapping[str, torch.Tensor] = {}
        if adapters:
            self._model, self._replaced = _attach(self._base, adapters, names, device)
        self._units = [_slots(self._module(path), names, deep=deep) for path, deep in units]
        self._modules = [self._module(path) for path, _ in units]
        if watch is not None:
            watch.attach(self._model, names, self._placed)
        self._fill_placeholders()
        self._model.eval()

    @property
    def model(self) -> PreTrainedModel:
        """The model, without its adapter, whose weights are placeholders while nothing runs."""
        return self._base

    def _module(self, path: str) -> nn.Module:
        inside = isinstance(self._model, PeftModel)
        return self._model.get_submodule(f"{BASE}{path}".removesuffix(".") if inside else path)

    def read_from(self, read: Read) -> None:
        """Run with the weights that `read` returns from now on; only for a model without adapters."""
        assert self._model is self._base, "adapters were read for the base that they are on"
        self._read = read
        self._fill_saved_buffers()

    def _fill_saved_buffers(self) -> None:
        saved = self._base.state_dict().keys()
        for name, buffer in self._base.named_buffers():
            if name in saved:
                buffer.copy_(self._read(name))

    def _place_buffers(self) -> None:
        for module in self._base.modules():  # parameters stay on the meta device
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, name, buffer.to(self._device))

    def _fill_placeholders(self) -> None:
        """Put placeholders for weights on the device: some models move their input to the device of a weight.

        They take no memory, and anything that reads them outside their unit computes NaN.
        """
        nothing = torch.tensor(torch.nan, device=self._device, dtype=self._dtype)
        for slot in (slot for slots in self._units for slot in slots):
            shape = slot.module.get_parameter(slot.attribute).shape
            setattr(slot.module, slot.attribute, nn.Parameter(nothing.expand(shape), requires_grad=False))

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits at each unmasked token, `(tokens, vocabulary)` in fp32 on the CPU.

        `ids` and `mask` are `(rows, seq)`, padded on the right.
        """
        with _streaming(self._modules, self._units, self._load):
            output = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False)
        logits: torch.Tensor = output.logits[mask.bool().to(self._device)].float().cpu()
        return logits

    def _load(self, slot: Slot) -> torch.Tensor:
        value = self._replaced[slot.name] if slot.name in self._replaced else self._read(slot.name)
        return self._placed(value, slot.name)

    def _placed(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """Return the value of the parameter `name` on the device and in the dtype of the computation."""
        dtype = next((dtype for pattern, dtype in self._fixed_dtypes.items() if re.search(pattern, name)), self._dtype)
        return value.to(self._device, dtype)


def _empty(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    config = deepcopy(config)
    # Buffers are computed now: those that are not saved, such as frequencies of positions, are in no file.
    with init_empty_weights(include_buffers=False):
        model = build_model(config, dtype, trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    return model


def unit_paths(model: nn.Module) -> list[tuple[str, bool]]:
    """Return the modules that get their weights at once, and whether including their submodules.

    These are the layers, and modules with weights outside of them.
    """
    units: list[tuple[str, bool]] = []
    layers: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{layer}.") for layer in layers):
            continue
        if path and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList):
            layers.append(path)
            units.append((path, True))
        elif any(True for _ in module.parameters(recurse=False)):
            # Submodules get weights when they run themselves: they may be layers, which must not be loaded together.
            units.append((path, not any(True for _ in module.children())))
    return units


def check_fit(model: nn.Module, dtype: torch.dtype, free_bytes: int) -> None:
    """Check that the largest unit of `model` fits in memory twice: as read, and as computed with.

    Raises:
        OutOfMemoryError: it does not.
    """
    needed = 2 * largest_unit_bytes(model, dtype)
    if needed > free_bytes:
        raise OutOfMemoryError(
            f"comparing needs {format_bytes(needed)} for one layer, and {format_bytes(free_bytes)} are free",
            hint="Free memory, or merge with --no-verify and --base original or dequantized.",
        )


def largest_unit_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes in `dtype` of the largest unit, whose weights are in memory at once."""
    units = [(model.get_submodule(path), deep) for path, deep in unit_paths(model)]
    sizes = [sum(weight.numel() for weight in unit.parameters(recurse=deep)) for unit, deep in units]
    return dtype.itemsize * max(sizes, default=0)


def _slots(module: nn.Module, names: dict[int, str], *, deep: bool) -> list[Slot]:
    holders = module.modules() if deep else [module]
    return [
        Slot(module=holder, attribute=attribute, name=names[id(parameter)])
        for holder in holders
        for attribute, parameter in holder.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    ]


@contextmanager
def _streaming(
    modules: Collection[nn.Module], units: Collection[list[Slot]], load: Callable[[Slot], torch.Tensor]
) -> Iterator[None]:
    """Load the weights of each unit while its module runs."""
    handles = []
    for module, slots in zip(modules, units, strict=True):
        empty = [(slot, slot.module.get_parameter(slot.attribute)) for slot in slots]

        def fill(_: nn.Module, __: Any, slots: list[Slot] = slots) -> None:
            for slot in slots:
                setattr(slot.module, slot.attribute, nn.Parameter(load(slot), requires_grad=False))

        def clear(_: nn.Module, __: Any, ___: Any, empty: list[tuple[Slot, nn.Parameter]] = empty) -> None:
            for slot, parameter in empty:
                setattr(slot.module, slot.attribute, parameter)

        # `always_call`: an error, such as no memory, must not leave the weights of its unit in memory.
        handles += [module.register_forward_pre_hook(fill), module.register_forward_hook(clear, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(
    base: PreTrainedModel, adapters: Sequence[WeightedAdapter], names: dict[int, str], device: torch.device
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Attach adapters, with weights in memory, to `base`; return it with the base parameters that they replace."""
    model: PeftModel | None = None
    replaced: dict[str, torch.Tensor] = {}
    labels = [f"adapter_{number}" for number in range(len(adapters))]
    with warnings.catch_warnings(), no_init_weights():
        warnings.simplefilter("ignore")
        for label, one in zip(labels, adapters, strict=True):
            config = deepcopy(one.adapter.config)
            config.inference_mode = True
            if model is None:
                model = get_peft_model(base, config, label, autocast_adapter_dtype=False)
            else:
                model.add_adapter(label, config)
            _materialize(model, names, device)
            _fill(model, label, one.adapter.adapter.values)
            replaced |= one.adapter.base_parameters
        assert model is not None, "there is an adapter"
        model.base_model.set_adapter(labels if len(labels) > 1 else labels[0])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for label, one in zip(labels, adapters, strict=True):
                if label in module.scaling:  # PEFT adds up the active adapters, each times its scaling
                    module.scaling[label] *= one.weight
    return model, replaced


def _fill(model: PeftModel, label: str, values: Mapping[str, torch.Tensor]) -> None:
    """Set the values of an adapter, except those of parameters of the base, such as biases.

    PEFT's own function is not used: it renames some keys a second time and then loses them.
    """
    parameters = get_peft_model_state_dict(model, adapter_name=label, save_embedding_layers=False)
    for key, value in values.items():
        parameters[key].copy_(value)


def _materialize(model: PeftModel, names: dict[int, str], device: torch.device) -> None:
    """Allocate the parameters of adapters in fp32; the base stays empty."""
    for module in model.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta and id(parameter) not in names:
                values = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
                setattr(module, attribute, nn.Parameter(values, requires_grad=False))
