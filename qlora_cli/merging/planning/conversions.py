"""Map the tensors of a checkpoint to the parameters of the model, and back.

transformers renames, stacks, joins and transposes tensors on loading (`core_model_loading`). The same rules, with the
same functions, map a parameter's update back to the files, so that a merge keeps their names and shapes.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from qlora_cli.errors import ModelError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of a checkpoint by name, and the parameters that they are converted to.

    Attributes:
        targets: Full names of the parameters, or buffers.
        sources: The names in the checkpoint by the pattern that they match, in order; one without a converter.
        intermediate_names: The name of each source before the converter, which the reverse conversion produces.
        converter: Converts sources to targets; None if they are the same.
        num_slices: The number of slices along the first dimension, such as experts, that convert independently.
    """

    targets: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    intermediate_names: Mapping[str, str] = field(default_factory=dict)
    converter: WeightConverter | None = None
    num_slices: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all its tensors in the checkpoint."""
        return tuple(key for keys in self.sources.values() for key in keys)

    def keys_of(self, index: int | None) -> tuple[str, ...]:
        """Return the names of the tensors of one slice, or of all if `index` is None."""
        return self.keys if index is None else tuple(keys[index] for keys in self.sources.values())

    def slice_of(self, key: str) -> int | None:
        """Return the slice that a tensor belongs to, if slices convert independently."""
        if self.num_slices is None:
            return None
        return next(keys.index(key) for keys in self.sources.values() if key in keys)

    def forward(self, model: PreTrainedModel, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Convert `tensors`, those of the group or of one slice, to parameters."""
        if self.converter is None:
            return {self.targets[0]: tensors[self.keys[0]]}
        converter = deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                if key in tensors:
                    _add(converter, self.targets[0], key, pattern, tensors[key])
        return _unwrapped(converter.convert(self.targets[0], model=model, config=model.config))

    def backward(self, model: PreTrainedModel, values: Tensors, index: int | None = None) -> dict[str, torch.Tensor]:
        """Convert `values`, parameters or a slice of each, to tensors of the checkpoint."""
        if self.converter is None:
            return {self.keys[0]: values[self.targets[0]]}
        converter = self.converter.reverse_transform()
        assert isinstance(converter, WeightConverter), "the reverse of a converter"
        first = ""
        for target, value in values.items():
            renamed, pattern = apply_converters(target, [converter])
            assert pattern is not None, "the reverse conversion matches the target"
            first = first or renamed
            _add(converter, renamed, target, pattern, value)
        made = _unwrapped(converter.convert(first, model=model, config=model.config))
        return {key: _find_by_name(made, self._intermediate_name(key, index)) for key in self.keys_of(index)}

    def _intermediate_name(self, key: str, index: int | None) -> str:
        """Return the name of a tensor after the reverse conversion; a single slice has the name of the first."""
        name = self.intermediate_names[key]
        if index is None or self.num_slices == 1:
            return name
        siblings = next(keys for keys in self.sources.values() if key in keys)
        first, second = (self.intermediate_names[sibling].split(".") for sibling in siblings[:2])
        (position,) = [
            position for position, (one, other) in enumerate(zip(first, second, strict=True)) if one != other
        ]
        parts = name.split(".")
        parts[position] = "0"
        return ".".join(parts)


def _add(converter: WeightConverter, target: str, source: str, pattern: str, tensor: torch.Tensor) -> None:
    value: Any = tensor  # declared for tensors yet to be read; a tensor works, too
    converter.add_tensor(target, source, pattern, value)


def _unwrapped(made: Mapping[str, torch.Tensor | list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _find_by_name(made: Tensors, name: str) -> torch.Tensor:
    """Return the tensor of this name, with or without the base model's prefix."""
    if name in made:
        return made[name]
    matches = [other for other in made if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if len(matches) != 1:
        raise ModelError(
            f"{name} can't be written back: transformers can't reverse its conversion on loading",
            hint="Leave it out of the adapter's targets, or merge with PEFT's merge_and_unload().",
        )
    return made[matches[0]]


@dataclass(frozen=True, kw_only=True)
class Conversions:
    """The contents of a checkpoint: the groups of the model, and the names of unexpected tensors."""

    groups: tuple[Group, ...]
    unexpected: tuple[str, ...]


def read_conversions(
    model: PreTrainedModel, names: Sequence[str], key_mapping: Mapping[str, str] | None = None
) -> Conversions:
    """Return how the tensors `names` of a checkpoint are converted to `model`, which is on the meta device.

    `key_mapping` renames them first, as it does for `from_pretrained`.
    """
    mapping = get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    grouped: dict[str, dict[str, list[str]]] = {}
    converted: dict[str, WeightConverter] = {}
    unexpected = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if target not in known:
            unexpected.append(name)
            continue
        grouped.setdefault(target, {}).setdefault(pattern or name, []).append(name)
        if pattern is not None:
            converted[target] = by_pattern[pattern]
    groups = tuple(
        _group(known, target, {pattern: tuple(keys) for pattern, keys in sources.items()}, converted, renamings)
        for target, sources in grouped.items()
    )
    return Conversions(groups=groups, unexpected=tuple(unexpected))


def _group(
    known: Collection[str],
    target: str,
    sources: Mapping[str, tuple[str, ...]],
    converted: Mapping[str, WeightConverter],
    renamings: list[WeightRenaming],
) -> Group:
    converter = converted.get(target)
    if converter is None:
        return Group(targets=(target,), sources=sources)
    ordered = {pattern: sources[pattern] for pattern in converter.source_patterns if pattern in sources}
    keys = [key for pattern in ordered.values() for key in pattern]
    return Group(
        targets=_targets(known, target, converter),
        sources=ordered,
        intermediate_names={key: apply_renamings(key, renamings) for key in keys},
        converter=converter,
        num_slices=_num_slices(converter, ordered),
    )


def _targets(known: Collection[str], first: str, converter: WeightConverter) -> tuple[str, ...]:
    """Return all targets of a converter, of which `first` is one; `known` are the names of the model."""
    patterns = converter.target_patterns
    names = [first.replace(patterns[0], pattern) for pattern in patterns]
    return tuple(name for name in names if name in known) or (first,)


def _num_slices(converter: WeightConverter, sources: Mapping[str, tuple[str, ...]]) -> int | None:
    """Return the number of stacked tensors, if no later operation mixes them."""
    first, *later = converter.operations
    sizes = {len(keys) for keys in sources.values()}
    if not isinstance(first, MergeModulelist) or first.dim != 0 or len(sizes) != 1:
        return None
    for operation in later:
        if isinstance(operation, Transpose) and not operation.check_dims and 0 not in (operation.dim0, operation.dim1):
            continue
        if isinstance(operation, Chunk | Concatenate | Interleave) and operation.dim > 0:
            continue
        return None
    return sizes.pop()
