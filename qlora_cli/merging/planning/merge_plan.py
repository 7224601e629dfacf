"""Plan which tensor of the checkpoint gets which change, and check it before a byte is written."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from qlora_cli.adapters.reader import SAME_BASE
from qlora_cli.errors import ModelError
from qlora_cli.merging.merge_result import Action
from qlora_cli.merging.planning.base_weights import BaseModel, parameter_groups, weight_of_constant
from qlora_cli.merging.planning.conversions import Group
from qlora_cli.merging.planning.weight_changes import WeightedChange
from qlora_cli.model_files.checkpoint import TensorHeader
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.pickles import DTYPES
from qlora_cli.model_files.unexpected_weights import hint_on_unexpected, may_be_ignored, prediction_layers
from qlora_cli.quantization.embedding import vocabulary_weights
from qlora_cli.settings.choices import BaseWeights, MergeDtype

Changes = Mapping[str, Sequence[WeightedChange]]
WRITTEN_IN = {MergeDtype.BF16: torch.bfloat16, MergeDtype.FP16: torch.float16, MergeDtype.FP32: torch.float32}
MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written.

    Attributes:
        name: Its name in the checkpoint.
        file: The file that it is written to.
        header: The tensor of the base that it comes from.
        dtype: The dtype that it is written in; for a copy, that of its bytes.
        shape: The shape that it is written in.
        action: What is done with it.
        group: The tensors of the same parameters; None if it is not part of the model.
        index: Its slice in the group.
        changes: The changes of each parameter of the group.
        is_weight: Whether it is a weight of the model, which must be finite.
    """

    name: str
    file: str
    header: TensorHeader
    dtype: torch.dtype
    shape: tuple[int, ...]
    action: Action
    group: Group | None = None
    index: int | None = None
    changes: Changes = field(default_factory=dict)
    is_weight: bool = False

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        if self.action == Action.COPY:
            return self.header.num_bytes
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """All tensors that will be written, in the order of the files; `unties` is set if head and embedding untie."""

    base: BaseWeights
    dtype: MergeDtype
    tensors: tuple[PlannedTensor, ...]
    unties: bool

    @property
    def files(self) -> dict[str, list[PlannedTensor]]:
        """The tensors of each file, in the order in which they are written."""
        files: dict[str, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            files.setdefault(tensor.file, []).append(tensor)
        return files

    @property
    def num_merged(self) -> int:
        """The number of tensors that an adapter changes."""
        return sum(tensor.action == Action.MERGE for tensor in self.tensors)

    @property
    def main_dtype(self) -> str:
        """The dtype that most bytes are written in, by its name in torch."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """The size of the tensors in the files."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_merge(
    base: BaseModel, config: ModelConfig, changes: Changes, kind: BaseWeights, dtype: MergeDtype
) -> MergePlan:
    """Plan every tensor of the checkpoint.

    Raises:
        ModelError: a change has no tensor, a tensor is unexpected, or a shape is wrong.
    """
    groups = parameter_groups(base.groups)
    _check_complete(base.model, groups)
    changes, untied, unties = _resolve_ties(base.model, groups, changes)
    _check_targets(changes, groups, untied)
    known = base.model.state_dict()
    for group in base.groups:
        _check_shapes(base, group, known)
    planner = _Planner(base=base, changes=changes, kind=kind, dtype=dtype)
    by_key = {key: group for group in base.groups for key in group.keys}
    packed_keys = {key for key, group in by_key.items() if group.targets[0] in base.packed}
    mtp_layers = prediction_layers(base.model.config, base.tensors.headers)
    tensors = []
    for name, header in base.tensors.headers.items():
        if name in by_key:
            tensors.append(planner.planned(name, header, by_key[name]))
        elif weight_of_constant(name) not in packed_keys:
            _check_unexpected(base.model, config, name, header, mtp_layers)
            tensors.append(planner.unexpected(name, header))
    for name, tied_to in untied.items():
        tensors.append(planner.untied(name, tied_to, groups[tied_to]))
    return MergePlan(base=kind, dtype=dtype, tensors=tuple(_in_order(tensors)), unties=unties)


def _in_order(tensors: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
    """Yield the tensors file by file, in the order of their bytes; new ones come last."""
    for file in sorted({tensor.file for tensor in tensors}):
        of_file = [tensor for tensor in tensors if tensor.file == file]
        yield from sorted(of_file, key=lambda tensor: (tensor.name != tensor.header.name, tensor.header.offset))


def _check_complete(model: PreTrainedModel, groups: Mapping[str, Group]) -> None:
    tied = model.all_tied_weights_keys or {}
    covered = {name for pair in tied.items() for name in pair if set(pair) & groups.keys()}
    missing = sorted(name for name, _ in model.named_parameters() if name not in groups and name not in covered)
    if missing:
        raise ModelError(
            f"the base lacks {len(missing)} of its weights: {', '.join(missing[:MOST_NAMED])}",
            hint="Check that the directory holds the whole model.",
        )


def _check_unexpected(
    model: PreTrainedModel, config: ModelConfig, name: str, header: TensorHeader, mtp_layers: Collection[int]
) -> None:
    if not may_be_ignored(model, config, name, header, mtp_layers):
        raise ModelError(
            f"the base holds {name} (in {header.file}), which its config.json does not describe",
            hint=hint_on_unexpected(model.config, [name]),
        )


def _check_targets(changes: Changes, groups: Mapping[str, Group], untied: Mapping[str, str]) -> None:
    unmatched = sorted(name for name in changes if name not in groups and name not in untied)
    if unmatched:
        raise ModelError(
            f"the adapter changes {', '.join(unmatched[:MOST_NAMED])}, which the base has no tensor for",
            hint=SAME_BASE,
        )


def _resolve_ties(
    model: PreTrainedModel, groups: Mapping[str, Group], changes: Changes
) -> tuple[Changes, dict[str, str], bool]:
    """Return the changes of stored tensors, the weights that get their own tensor, and whether any are untied.

    Tied weights stay tied if they are changed alike; head and embedding may be untied.
    """
    untied: dict[str, str] = {}
    changes, unties = dict(changes), False
    vocabulary = vocabulary_weights(model)
    for one, other in (model.all_tied_weights_keys or {}).items():
        pairs = ((one, other), (other, one))
        if _are_alike(changes.get(one, ()), changes.get(other, ())):
            for name, tied_to in pairs:
                if name not in groups and tied_to in groups:
                    changes.pop(name, None)
            continue
        if not {one, other} <= vocabulary:
            raise ModelError(
                f"{one} and {other} are tied in the base, and the adapter changes them differently",
                hint="Give both the same adapter, or serve it as an adapter.",
            )
        unties = True
        untied |= {name: tied_to for name, tied_to in pairs if name not in groups}
    return changes, untied, unties


def _are_alike(changes: Sequence[WeightedChange], others: Sequence[WeightedChange]) -> bool:
    return len(changes) == len(others) and all(map(_is_same, changes, others))


def _is_same(one: WeightedChange, other: WeightedChange) -> bool:
    return one.weight == other.weight and (one.change is other.change or one.change.equals(other.change))


def _check_shapes(base: BaseModel, group: Group, known: Mapping[str, torch.Tensor]) -> None:
    """Check that stored tensors convert to parameters of the expected shapes, and back."""
    headers = base.tensors.headers
    if group.targets[0] in base.packed:
        return  # packed sizes are checked by the loader
    index = 0 if group.num_slices else None
    for keys in group.sources.values():
        for key in keys if group.num_slices else ():
            _expect(headers[key], headers[keys[0]].shape, f"{keys[0]} has {headers[keys[0]].shape}")
    stored = {key: torch.empty(headers[key].shape, device="meta") for key in group.keys_of(index)}
    made = group.forward(base.model, stored)
    for target in group.targets:
        expected = list(known[target].shape)
        if target in base.extended:
            expected[0] = made[target].shape[0]
        if index is not None:
            expected[0] = 1
        if list(made[target].shape) != expected:
            raise ModelError(
                f"{headers[group.keys[0]].file}: {group.keys[0]} gives {target} the shape "
                f"{tuple(made[target].shape)}, and config.json says {tuple(expected)}",
                hint="The weights belong to another config.json; download the model again as a whole.",
            )
    for key, value in group.backward(base.model, made, index).items():
        assert tuple(value.shape) == headers[key].shape, f"{key} converts back to another shape"


def _expect(header: TensorHeader, shape: tuple[int, ...], why: str) -> None:
    if header.shape != shape:
        raise ModelError(
            f"{header.file}: {header.name} has the shape {header.shape}, and {why}",
            hint="The weights belong to another config.json; download the model again as a whole.",
        )


@dataclass(frozen=True, kw_only=True)
class _Planner:
    base: BaseModel
    changes: Changes
    kind: BaseWeights
    dtype: MergeDtype

    def planned(self, name: str, header: TensorHeader, group: Group) -> PlannedTensor:
        """Plan a tensor of a parameter."""
        changes = {target: self.changes[target] for target in group.targets if target in self.changes}
        written = self._written_in(header, group.targets[0])
        shape = self._shape(header, group)
        if changes:
            action = Action.MERGE
        elif self._is_dequantized(group):
            action = Action.DEQUANTIZE
        elif written != DTYPES.get(header.dtype) or shape != header.shape or self.base.tensors.is_pickle:
            action = Action.CAST
        else:
            action = Action.COPY
        return PlannedTensor(
            name=name,
            file=_safetensors(header.file),
            header=header,
            dtype=written,
            shape=shape,
            action=action,
            group=group,
            index=group.slice_of(name),
            changes=changes,
            is_weight=self.base.is_weight(group),
        )

    def unexpected(self, name: str, header: TensorHeader) -> PlannedTensor:
        """Plan a tensor that is not part of the text model."""
        written = self._written_in(header, name)
        # A tensor of an unknown dtype is copied, such as 8-bit floats of a tower.
        is_as_stored = written == DTYPES.get(header.dtype, written) and not self.base.tensors.is_pickle
        action = Action.COPY if is_as_stored else Action.CAST
        return PlannedTensor(
            name=name, file=_safetensors(header.file), header=header, dtype=written, shape=header.shape, action=action
        )

    def untied(self, name: str, tied_to: str, group: Group) -> PlannedTensor:
        """Plan a parameter that is tied to `tied_to` in the base, and not stored separately."""
        header = self.base.tensors.headers[group.keys[0]]
        changes = {tied_to: self.changes[name]} if name in self.changes else {}
        return PlannedTensor(
            name=name,
            file=_safetensors(header.file),
            header=header,
            dtype=self._written_in(header, tied_to),
            shape=self._shape(header, group),
            action=Action.MERGE if changes else Action.CAST,
            group=group,
            changes=changes,
        )

    def _is_dequantized(self, group: Group) -> bool:
        """Return whether the base's values are dequantized, unlike those in its files."""
        names = self.base.quantized if self.kind == BaseWeights.DEQUANTIZED else self.base.packed
        return any(target in names for target in group.targets)

    def _shape(self, header: TensorHeader, group: Group) -> tuple[int, ...]:
        target = group.targets[0]
        if target in self.base.packed:
            return tuple(self.base.model.get_parameter(target).shape)
        if target in self.base.extended:
            return (self.base.num_rows or 0, *header.shape[1:])
        return header.shape

    def _written_in(self, header: TensorHeader, target: str) -> torch.dtype:
        stored = DTYPES.get(header.dtype, torch.uint8)
        is_packed = target in self.base.packed
        if not stored.is_floating_point and not is_packed:
            return stored
        if self.dtype == MergeDtype.KEEP:
            return self.base.layout.dtype if is_packed else stored
        target_dtype = WRITTEN_IN[self.dtype]
        fixed: dict[str, torch.dtype] = self.base.model._get_dtype_plan(target_dtype)
        return next((dtype for pattern, dtype in fixed.items() if re.search(pattern, target)), target_dtype)


def _safetensors(file: str) -> str:
    """Return the name of a file of weights as safetensors."""
    return file.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors") + ".safetensors"
