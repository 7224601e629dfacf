"""No quantization: the weights of linear layers stay in 16 or 32 bit, as all others do."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_cli.quantization.entries import WeightEntry, dtype_name
from qlora_cli.quantization.methods.method import Allocation, Method, WeightPart
from qlora_cli.settings.models import QuantizationSettings


class Unquantized(Method):
    """Weights as they are."""

    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return what the weight takes."""
        return WeightEntry(
            name=name,
            kind=kind,
            why_not="not asked for",
            num_parameters=shape.numel(),
            weight_bytes=shape.numel() * dtype.itemsize,
            constant_bytes=0,
            dtype=dtype_name(dtype),
        )

    def config(self, settings: QuantizationSettings, **_: Any) -> None:
        """Return nothing: weights are loaded as they are."""

    def store_on_meta(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        *,
        unquantized: Sequence[str],
        experts: Sequence[str],
        compute_dtype: torch.dtype,
    ) -> None:
        """Leave `model` as it is."""

    def allocations(
        self,
        entry: WeightEntry,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        num_pieces: int,
    ) -> Iterator[Allocation]:
        """Yield the weight."""
        yield Allocation(num_bytes=entry.weight_bytes, part=WeightPart.WEIGHT)

    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return the weight."""
        return weight


METHOD = Unquantized()
