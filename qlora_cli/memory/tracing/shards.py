"""What each process holds of a base that is sharded among several, and what they send each other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qlora_cli.quantization.embedding import is_tied
from qlora_cli.quantization.entries import WeightEntry
from qlora_cli.quantization.sharded_units import ends_of, layers_of

EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True, slots=True)
class WeightShard:
    """The part of a weight that one process holds: its unit, and the bytes of the part in each of `num_units`.

    A weight that embedding and head share is a part of both units.
    """

    unit: str
    num_bytes: int
    num_units: int = 1

    @property
    def is_of_end(self) -> bool:
        """Whether it is of the embedding or the head."""
        return self.unit in (EMBEDDING, HEAD)


@dataclass(frozen=True, kw_only=True)
class ShardedBase:
    """The weights of a base that is sharded, by name; those without a shard are whole on every process.

    `is_on_host`: shards are kept in host memory, and copied to the device when they are gathered. A
    micro-batch passes `num_forward` times forward through the base.
    """

    shards: Mapping[str, WeightShard]
    num_processes: int
    is_on_host: bool
    num_forward: int = 1

    @property
    def shard_bytes(self) -> int:
        """What each process holds of the sharded weights."""
        return sum(shard.num_bytes * shard.num_units for shard in self.shards.values())

    @property
    def received_bytes(self) -> int:
        """What each process receives for a micro-batch: layers and embedding forward and backward, the head forward.

        The embedding is not needed backward, but gathered for it by `fully_shard`.
        """
        return (self.num_processes - 1) * self._gathered_bytes

    @property
    def copied_bytes(self) -> int:
        """What each process copies from the host to its device for a micro-batch: its own share of what it gathers."""
        return self._gathered_bytes if self.is_on_host else 0

    @property
    def host_bytes(self) -> int:
        """What the shards of each process take of the host's memory, as PyTorch pins it: each in a power of two.

        `c10/core/CachingHostAllocator.h`, `allocate`.
        """
        if not self.is_on_host:
            return 0
        return sum((1 << (shard.num_bytes - 1).bit_length()) * shard.num_units for shard in self.shards.values())

    @property
    def _gathered_bytes(self) -> int:
        return sum(shard.num_bytes * self._times(shard) for shard in self.shards.values())

    def _times(self, shard: WeightShard) -> int:
        forward = shard.num_units * self.num_forward
        return forward + (0 if shard.unit == HEAD else 1)


def sharded_base(
    shapes: PreTrainedModel,
    adapted: PreTrainedModel,
    entries: Mapping[str, WeightEntry],
    num_processes: int,
    *,
    is_on_host: bool = False,
    num_forward: int = 1,
) -> ShardedBase:
    """Return how the weights of `shapes`, stored as `entries` say, are divided.

    `adapted` is the model with its adapter, whose embedding and head are whole if they are trained.
    """
    parameters = dict(shapes.named_parameters())
    shards = {}
    for name, unit in _units(shapes, adapted):
        entry = entries.get(name)
        if entry is None:  # tied, and known by its other name
            continue
        rows = entry.weight_bytes if entry.is_quantized else parameters[name].shape[0]
        num_bytes = -(-rows // num_processes) * (entry.weight_bytes // rows)
        shares_head = unit == EMBEDDING and is_tied(shapes) and ends_of(adapted)[1] is not None
        shards[name] = WeightShard(unit, num_bytes, 2 if shares_head else 1)
    return ShardedBase(shards=shards, num_processes=num_processes, is_on_host=is_on_host, num_forward=num_forward)


def _units(shapes: PreTrainedModel, adapted: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yield the name of each weight that is sharded, and its unit."""
    layers = {id(layer) for layer in layers_of(shapes)}
    ends: dict[int, tuple[str, nn.Module | None]] = {
        id(shapes.get_output_embeddings()): (HEAD, ends_of(adapted)[1]),
        id(shapes.get_input_embeddings()): (EMBEDDING, ends_of(adapted)[0]),
    }
    for name, module in shapes.named_modules():
        unit, is_sharded = name, id(module) in layers
        if id(module) in ends:
            unit, end = ends[id(module)]
            is_sharded = end is not None
        if is_sharded:
            yield from ((f"{name}.{part}", unit) for part, _ in module.named_parameters())
