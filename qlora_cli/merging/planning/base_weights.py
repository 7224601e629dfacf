"""The weights of the base that is merged into: as stored, or quantized and dequantized as in training.

`Base` returns any parameter of the model, converted from the tensors of its files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.keys import with_ties
from qlora_cli.merging.planning.buffer import Buffer
from qlora_cli.merging.planning.conversions import Group
from qlora_cli.merging.planning.stored_tensors import StoredTensors, not_finite
from qlora_cli.model_files.finite import is_finite
from qlora_cli.quantization.methods import all_methods
from qlora_cli.quantization.methods.method import ExpertStack
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.settings.choices import BaseWeights


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The base on the meta device, how training stored it, and its tensors in files.

    Attributes:
        extended: The parameters of embedding and head, if they are extended to `num_rows` rows.
        quantized: The parameters that training quantized.
        packed: The parameters that the checkpoint holds quantized.
    """

    model: PreTrainedModel
    layout: StoragePlan
    tensors: StoredTensors
    groups: tuple[Group, ...]
    num_rows: int | None
    extended: frozenset[str]
    quantized: frozenset[str]
    packed: frozenset[str]

    def is_weight(self, group: Group) -> bool:
        """Return whether a group is of weights; a buffer may hold infinite values."""
        module, _, leaf = group.targets[0].rpartition(".")
        return leaf in self.model.get_submodule(module)._parameters


class Base:
    """Returns the parameters of a base, original or dequantized by `kind`."""

    def __init__(self, base: BaseModel, kind: BaseWeights) -> None:
        self._base = base
        self.kind = kind
        self._round_trips = base.quantized - base.packed if kind == BaseWeights.DEQUANTIZED else frozenset()
        self._constants: dict[str, list[str]] = {}  # by the name of their weight
        for name in base.tensors.headers if base.packed else ():
            if weight := weight_of_constant(name):
                self._constants.setdefault(weight, []).append(name)
        self._stacked: tuple[Group, str, ExpertStack] | None = None
        self._finite: set[str] = set()

    def parameters(
        self, group: Group, index: int | None = None, buffer: Buffer | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the parameters of a group, or the slice `index` of each, in the dtype that they have in the base.

        The caller may modify them; a single tensor may be in `buffer`.
        """
        if index is not None and (group.targets[0] in self._round_trips):
            return {target: self._stack(group, target).slice(index) for target in group.targets}
        stored = {key: self._stored(group, key, buffer) for key in group.keys_of(index)}
        made = group.forward(self._base.model, stored)
        return {target: self._as_trained(target, value) for target, value in made.items()}

    def _stored(self, group: Group, key: str, buffer: Buffer | None) -> torch.Tensor:
        assert buffer is None or group.converter is None, "the buffer holds one tensor"
        if group.targets[0] not in self._base.packed:
            return self._read(group, key, buffer)
        tensor = self._base.tensors.read(key, buffer)
        return self._unpacked(key, group.targets[0], tensor)

    def _read(self, group: Group, key: str, buffer: Buffer | None = None) -> torch.Tensor:
        """Return a tensor as it is stored; one that is read repeatedly is checked once.

        Raises:
            ModelError: it holds NaN or infinity.
        """
        tensor = self._base.tensors.read(key, buffer)
        if key not in self._finite and tensor.is_floating_point() and self._base.is_weight(group):
            if not is_finite(tensor):
                raise not_finite(self._base.tensors.headers[key])
            self._finite.add(key)
        return tensor

    def _as_trained(self, target: str, value: torch.Tensor) -> torch.Tensor:
        if target in self._round_trips:
            value = self._quantize_round_trip(target, value)
        if target in self._base.extended:
            value = extended(value, self._base.num_rows or 0, self._base.layout.dtype)
        return value

    def _quantize_round_trip(self, target: str, value: torch.Tensor) -> torch.Tensor:
        layout = self._base.layout
        is_transposed = self._is_conv1d(target)  # stored as (in, out), quantized as (out, in)
        weight = value.to(layout.dtype)
        weight = weight.T.contiguous() if is_transposed else weight
        weight = layout.method.round_trip(weight, layout.settings)
        return weight.T.contiguous() if is_transposed else weight

    def _is_conv1d(self, target: str) -> bool:
        return isinstance(self._base.model.get_submodule(target.rpartition(".")[0]), Conv1D)

    def _stack(self, group: Group, target: str) -> ExpertStack:
        """Return quantized stacked experts; the last stack is cached, since its tensors are requested in sequence."""
        if self._stacked is not None and self._stacked[0] is group and self._stacked[1] == target:
            return self._stacked[2]
        self._stacked = None
        shape = self._base.model.get_parameter(target).shape
        assert group.num_slices is not None, "requested by slices"
        layout = self._base.layout
        stack = layout.method.stacked(self._slices(group, target, group.num_slices), shape, layout.settings)
        self._stacked = (group, target, stack)
        return stack

    def _slices(self, group: Group, target: str, num_slices: int) -> Iterator[torch.Tensor]:
        num_weights = self._base.model.get_parameter(target).shape[1:].numel()
        for index in range(num_slices) if self._base.layout.method.is_divisible(num_weights) else (None,):
            stored = {key: self._read(group, key).to(self._base.layout.dtype) for key in group.keys_of(index)}
            yield group.forward(self._base.model, stored)[target]

    def _unpacked(self, key: str, target: str, codes: torch.Tensor) -> torch.Tensor:
        """Return a dequantized weight of a quantized checkpoint."""
        is_transposed = self._is_conv1d(target)
        tensors, layout = self._base.tensors, self._base.layout
        constants = {name: tensors[name] for name in self._constants[key]}
        weight = layout.method.restored(key, codes, constants, layout.dtype)
        return weight.T.contiguous() if is_transposed else weight


def weight_of_constant(name: str) -> str | None:
    """Return the weight whose constants a tensor of a quantized checkpoint holds; None if it holds none."""
    weights = (method.weight_of_constant(name) for method in all_methods())
    return next((weight for weight in weights if weight is not None), None)


def extended(values: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an embedding, a head or its bias extended as in training: new rows are the mean of the others.

    `dtype` is the one that training held them in, and rounded the mean to.
    """
    mean = values.to(dtype).mean(0, dtype=torch.float32).to(dtype)
    result = values.new_empty((num_rows, *values.shape[1:]), dtype=torch.promote_types(values.dtype, dtype))
    result[: len(values)] = values
    result[len(values) :] = mean
    return result


def parameter_groups(groups: tuple[Group, ...]) -> Mapping[str, Group]:
    """Return the group of each parameter, by its name."""
    return {target: group for group in groups for target in group.targets}


def base_reader(model: BaseModel, base: Base) -> Callable[[str], torch.Tensor]:
    """Return a function that reads the parameters of `base`, those of `model`, by their own or a tied name."""
    groups = parameter_groups(model.groups)
    stored = with_ties(groups, model.model.all_tied_weights_keys or {})
    return lambda name: base.parameters(groups[stored[name]])[stored[name]]
