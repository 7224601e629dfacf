"""The weights of the base that is merged into: as they are stored, or as training saw them.

`Base` gives any parameter of the model, whichever tensors of whichever files it is made of.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.merging.conversions import Group
from qlora_cli.merging.room import Room
from qlora_cli.merging.stored import StoredTensors
from qlora_cli.quantization.blocks import BLOCK_SIZE, FourBit
from qlora_cli.quantization.layout import STORAGE_DTYPES, Layout
from qlora_cli.quantization.round_trip import Quantized, quantized, through_int8
from qlora_cli.settings.choices import BaseWeights

# What bitsandbytes stores beside packed codes.
CONSTANT = re.compile(r"(.*)\.((nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+)")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The base on the meta device, how training stored it, and where its tensors are.

    Attributes:
        grown: The parameters of embedding and head, if they have been given more rows, `num_rows` of them.
        quantized: The parameters that training had quantized.
        packed: Those of them that the checkpoint holds quantized.
    """

    model: PreTrainedModel
    layout: Layout
    tensors: StoredTensors
    groups: tuple[Group, ...]
    num_rows: int | None
    grown: frozenset[str]
    quantized: frozenset[str]
    packed: frozenset[str]


class Base:
    """Gives the parameters of a base, as `kind` says."""

    def __init__(self, base: BaseModel, kind: BaseWeights) -> None:
        self._base = base
        self.kind = kind
        self._through = base.quantized - base.packed if kind == BaseWeights.DEQUANTIZED else frozenset()
        self._stacked: tuple[Group, str, Quantized] | None = None

    def parameters(self, group: Group, index: int | None = None, room: Room | None = None) -> dict[str, torch.Tensor]:
        """Return the parameters of a group, or the slice `index` of each, in the dtype that they have in the base.

        They are the caller's own; that of a single tensor may be in `room`.
        """
        if index is not None and (group.targets[0] in self._through):
            return {target: self._stack(group, target).slice(index) for target in group.targets}
        stored = {key: self._stored(group, key, room) for key in group.keys_of(index)}
        made = group.forward(self._base.model, stored)
        return {target: self._as_seen(target, value) for target, value in made.items()}

    def _stored(self, group: Group, key: str, room: Room | None) -> torch.Tensor:
        assert room is None or group.converter is None, "there is room for one"
        tensor = self._base.tensors.read(key, room)
        if group.targets[0] not in self._base.packed:
            return tensor
        return self._unpacked(key, group.targets[0], tensor)

    def _as_seen(self, target: str, value: torch.Tensor) -> torch.Tensor:
        if target in self._through:
            value = self._through_quantization(target, value)
        if target in self._base.grown:
            value = grown(value, self._base.num_rows or 0, self._base.layout.dtype)
        return value

    def _through_quantization(self, target: str, value: torch.Tensor) -> torch.Tensor:
        layout = self._base.layout
        flips = self._is_conv1d(target)  # stored as (in, out), and quantized as (out, in)
        weight = value.to(layout.dtype)
        weight = weight.T.contiguous() if flips else weight
        if layout.settings.method.is_4bit:
            weight = quantized([weight], weight.shape, _four_bit(layout)).dequantized()
        else:
            weight = through_int8(weight)
        return weight.T.contiguous() if flips else weight

    def _is_conv1d(self, target: str) -> bool:
        return isinstance(self._base.model.get_submodule(target.rpartition(".")[0]), Conv1D)

    def _stack(self, group: Group, target: str) -> Quantized:
        """Return stacked experts in 4 bit; the last ones are kept, since their tensors come one after another."""
        if self._stacked is not None and self._stacked[0] is group and self._stacked[1] == target:
            return self._stacked[2]
        self._stacked = None
        shape = self._base.model.get_parameter(target).shape
        assert group.num_slices is not None, "asked for by slices"
        stack = quantized(self._slices(group, target, group.num_slices), shape, _four_bit(self._base.layout))
        self._stacked = (group, target, stack)
        return stack

    def _slices(self, group: Group, target: str, num_slices: int) -> Iterator[torch.Tensor]:
        spans = self._base.model.get_parameter(target).shape[1:].numel() % BLOCK_SIZE != 0  # a block two slices
        for index in (None,) if spans else range(num_slices):
            stored = {key: self._base.tensors[key].to(self._base.layout.dtype) for key in group.keys_of(index)}
            yield group.forward(self._base.model, stored)[target]

    def _unpacked(self, key: str, target: str, codes: torch.Tensor) -> torch.Tensor:
        """Return a weight that is stored quantized, dequantized."""
        flips = self._is_conv1d(target)
        tensors, dtype = self._base.tensors, self._base.layout.dtype
        if codes.dtype == torch.int8:
            scales = tensors[f"{key.removesuffix('weight')}SCB"]
            weight: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales).to(dtype)
        else:
            names = [
                name for name in tensors.headers if name.startswith(f"{key}.") and weight_of_constant(name) == key
            ]
            constants = {name.removeprefix(f"{key}."): tensors[name] for name in names}
            packed = Params4bit.from_prequantized(codes, constants, device=torch.device("cpu"))
            packed.quant_state.dtype = dtype
            weight = Quantized.of(packed.data, packed.quant_state).dequantized()
        return weight.T.contiguous() if flips else weight


def weight_of_constant(name: str) -> str | None:
    """Return the weight that a tensor of a quantized checkpoint holds constants of; None if it looks like none."""
    for suffix in ("SCB", "weight_format"):
        if name.endswith(f".{suffix}"):
            return f"{name.removesuffix(suffix)}weight"
    match = CONSTANT.fullmatch(name)
    return match[1] if match else None


def grown(values: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an embedding, a head or its bias with more rows, as training grew them: by the mean of the others.

    `dtype` is the one that training held them in, and rounded the mean to.
    """
    mean = values.to(dtype).mean(0, dtype=torch.float32).to(dtype)
    more = values.new_empty((num_rows, *values.shape[1:]), dtype=torch.promote_types(values.dtype, dtype))
    more[: len(values)] = values
    more[len(values) :] = mean
    return more


def _four_bit(layout: Layout) -> FourBit:
    settings = layout.settings
    return FourBit(
        quant_type=settings.method.value,
        double_quant=settings.double_quant,
        storage=STORAGE_DTYPES[settings.quant_storage],
    )


def parameter_groups(groups: tuple[Group, ...]) -> Mapping[str, Group]:
    """Return the group of each parameter, by its name."""
    return {target: group for group in groups for target in group.targets}
