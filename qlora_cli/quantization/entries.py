"""What the weights of a model take as they are stored, weight by weight, and summed up."""

from dataclasses import dataclass

import torch

from qlora_cli.quantization.load_report import KindCount


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """One weight: how many parameters, and what it takes as it is stored. `why_not` it is quantized, if it is not."""

    name: str
    kind: str
    why_not: str | None
    num_parameters: int
    weight_bytes: int
    constant_bytes: int
    dtype: str

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in 4 or 8 bit."""
        return self.why_not is None


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The weights of a model, and its buffers. Tied weights count once."""

    entries: tuple[WeightEntry, ...]
    buffer_bytes: int

    @property
    def num_parameters(self) -> int:
        """All of them, counted as if nothing were packed."""
        return sum(entry.num_parameters for entry in self.entries)

    @property
    def num_quantized_parameters(self) -> int:
        """Those that are stored in 4 or 8 bit."""
        return sum(entry.num_parameters for entry in self.entries if entry.is_quantized)

    @property
    def quantized_weight_bytes(self) -> int:
        """The packed codes."""
        return sum(entry.weight_bytes for entry in self.entries if entry.is_quantized)

    @property
    def quantization_constant_bytes(self) -> int:
        """Scales, their own scales, offsets and code tables."""
        return sum(entry.constant_bytes for entry in self.entries)

    @property
    def unquantized_bytes(self) -> int:
        """All other parameters, and the buffers."""
        return self.buffer_bytes + sum(entry.weight_bytes for entry in self.entries if not entry.is_quantized)

    @property
    def total_bytes(self) -> int:
        """Everything the model holds."""
        return self.quantized_weight_bytes + self.quantization_constant_bytes + self.unquantized_bytes

    @property
    def bits_per_quantized_parameter(self) -> float | None:
        """Codes and constants; None if nothing is quantized."""
        if not self.num_quantized_parameters:
            return None
        return 8 * (self.quantized_weight_bytes + self.quantization_constant_bytes) / self.num_quantized_parameters

    @property
    def float32_bytes(self) -> int:
        """What the parameters would take in fp32."""
        return 4 * self.num_parameters

    @property
    def float16_bytes(self) -> int:
        """What the parameters would take in 16 bit."""
        return 2 * self.num_parameters

    @property
    def largest_parameters(self) -> int:
        """Of the largest weight: what is read at a time while loading."""
        return max((entry.num_parameters for entry in self.entries), default=0)

    def bytes_by_dtype(self) -> dict[str, int]:
        """Return the bytes of the weights, without constants and buffers, by the dtype they are stored in."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.dtype] = found.get(entry.dtype, 0) + entry.weight_bytes
        return found

    def kinds(self) -> tuple[KindCount, ...]:
        """Return parameters and bytes by kind, with why a kind is not quantized, the largest first."""
        groups: dict[tuple[str, str | None], list[WeightEntry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.kind, entry.why_not), []).append(entry)
        counts = (
            KindCount(
                kind=kind,
                why_not_quantized=why_not,
                num_weights=len(entries),
                num_parameters=sum(entry.num_parameters for entry in entries),
                num_bytes=sum(entry.weight_bytes + entry.constant_bytes for entry in entries),
            )
            for (kind, why_not), entries in groups.items()
        )
        return tuple(sorted(counts, key=lambda count: -count.num_bytes))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype as reports name it: `bfloat16`, `uint8`."""
    return str(dtype).removeprefix("torch.")
