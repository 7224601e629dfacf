"""The bytes of a model's weights as they are stored, one by one and in total."""

from dataclasses import dataclass

import torch

from qlora_cli.quantization.load_report import KindCount


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """One weight: its parameters, and its bytes as stored. `why_not` is the reason why it is not quantized, if so."""

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
    """The weights and buffers of a model. Tied weights count once."""

    entries: tuple[WeightEntry, ...]
    buffer_bytes: int

    @property
    def num_parameters(self) -> int:
        """The number of parameters, as if nothing were packed."""
        return sum(entry.num_parameters for entry in self.entries)

    @property
    def num_quantized_parameters(self) -> int:
        """The number of parameters that are stored in 4 or 8 bit."""
        return sum(entry.num_parameters for entry in self.entries if entry.is_quantized)

    @property
    def quantized_weight_bytes(self) -> int:
        """The bytes of the packed codes."""
        return sum(entry.weight_bytes for entry in self.entries if entry.is_quantized)

    @property
    def quantization_constant_bytes(self) -> int:
        """The bytes of scales, scales of scales, offsets and code tables."""
        return sum(entry.constant_bytes for entry in self.entries)

    @property
    def unquantized_bytes(self) -> int:
        """The bytes of all other parameters, and of the buffers."""
        return self.buffer_bytes + sum(entry.weight_bytes for entry in self.entries if not entry.is_quantized)

    @property
    def total_bytes(self) -> int:
        """The bytes of all weights and buffers."""
        return self.quantized_weight_bytes + self.quantization_constant_bytes + self.unquantized_bytes

    @property
    def bits_per_quantized_parameter(self) -> float | None:
        """The bits of codes and constants per quantized parameter; None if nothing is quantized."""
        if not self.num_quantized_parameters:
            return None
        return 8 * (self.quantized_weight_bytes + self.quantization_constant_bytes) / self.num_quantized_parameters

    @property
    def float32_bytes(self) -> int:
        """The bytes of the parameters in fp32."""
        return 4 * self.num_parameters

    @property
    def float16_bytes(self) -> int:
        """The bytes of the parameters in 16 bit."""
        return 2 * self.num_parameters

    @property
    def largest_parameters(self) -> int:
        """The parameters of the largest weight, which is read at once while loading."""
        return max((entry.num_parameters for entry in self.entries), default=0)

    def bytes_by_dtype(self) -> dict[str, int]:
        """Return the bytes of the weights, without constants and buffers, by stored dtype."""
        totals: dict[str, int] = {}
        for entry in self.entries:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.weight_bytes
        return totals

    def kinds(self) -> tuple[KindCount, ...]:
        """Return parameters and bytes by kind and by the reason for not being quantized, the largest first."""
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
    """Return the name of a dtype in reports: `bfloat16`, `uint8`."""
    return str(dtype).removeprefix("torch.")
