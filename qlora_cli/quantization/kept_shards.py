"""Keep of each weight that is read only the part of one process."""

from collections.abc import Iterator

import torch
from torch import nn

from qlora_cli.hardware.heap import return_freed_memory


class KeptShards:
    """The parts of the weights of a model's layers that one of several processes keeps, as `fully_shard` divides them.

    While the model is loaded, each weight is read as a whole, and replaced by a placeholder of its shape with one
    element of memory. Copying returns the same object: transformers copies the config that holds it.
    """

    def __init__(
        self, *, rank: int, size: int, device: torch.device, layers: tuple[str, ...], on_host: bool = False
    ) -> None:
        """Keep shards of the weights whose full names begin with the name of one of `layers`.

        They are kept on `device`, where they are quantized; or `on_host`, in memory that a GPU copies from.
        """
        self.device = device
        self.on_host = on_host
        self._rank = rank
        self._size = size
        self._prefixes = tuple(f"{layer}." for layer in layers)
        # By the storage of the placeholder, which the module and PEFT may name and wrap as they like.
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "KeptShards":
        return self

    def is_of_layer(self, name: str) -> bool:
        """Return whether a shard is kept of the weight of this full name."""
        return name.startswith(self._prefixes)

    def keep(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Keep the shard of a weight of a layer, and return its placeholder; return any other weight as it is."""
        if not self.is_of_layer(name):
            return weight
        chunks = torch.chunk(weight, self._size)
        part = chunks[self._rank] if self._rank < len(chunks) else weight[:0]
        if self.device.type == "cpu":  # whose heap would keep the room of whole weights between the shards
            return_freed_memory()
        placeholder = weight.new_zeros((1,) * weight.ndim)
        self._parts[_address(placeholder)] = (placeholder, self._copied(part))
        return placeholder.expand(weight.shape)

    def _copied(self, part: torch.Tensor) -> torch.Tensor:
        if not self.on_host:
            return part.clone()
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=self.pins).copy_(part)

    @property
    def pins(self) -> bool:
        """Whether shards are in pinned memory, from which a GPU copies while it computes."""
        return self.on_host and self.device.type == "cuda"

    def take(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return the shard of the weight that `parameter` holds the place of, and forget it; None if it is whole."""
        _, part = self._parts.pop(_address(parameter), (None, None))
        return part

    @property
    def num_left(self) -> int:
        """The number of shards that were not taken."""
        return len(self._parts)

    @property
    def num_bytes(self) -> int:
        """The bytes of the shards that were not taken."""
        return sum(part.nbytes for _, part in self._parts.values())


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def layer_names(model: nn.Module, layer_type: type[nn.Module]) -> Iterator[str]:
    """Yield the names of the layers of `model`."""
    return (name for name, module in model.named_modules() if isinstance(module, layer_type))
