"""No quantization: the weights of linear layers stay in 16 or 32 bit, like all others."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.errors import ModelError
from qlora_cli.quantization.entries import WeightEntry, dtype_name
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.methods.method import Allocation, Method, Operator, WeightPart
from qlora_cli.quantization.methods.shard_loader import ShardConfig
from qlora_cli.quantization.methods.unquantized_product import (
    OPERATOR,
    Conv1DProduct,
    LinearProduct,
    sum_temporaries,
)
from qlora_cli.settings.models import QuantizationSettings


class Unquantized(Method):
    """Weights without quantization."""

    operators = MappingProxyType({OPERATOR: Operator(temporaries=sum_temporaries)})
    fused_products = (LinearProduct(), Conv1DProduct())

    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return the bytes of the weight."""
        return WeightEntry(
            name=name,
            kind=kind,
            why_not="not asked for",
            num_parameters=shape.numel(),
            weight_bytes=shape.numel() * dtype.itemsize,
            constant_bytes=0,
            dtype=dtype_name(dtype),
        )

    def config(
        self, settings: QuantizationSettings, *, shards: KeptShards | None = None, **_: Any
    ) -> ShardConfig | None:
        """Return None: weights are loaded unchanged, unless `shards` keeps those of one process."""
        return None if shards is None else ShardConfig(shards)

    def refused_weights(self, config: QuantizationConfigMixin) -> Mapping[str, ModelError]:
        """Return the errors of weights of which no shard could be kept."""
        assert isinstance(config, ShardConfig)
        return config.refused.errors

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
        """Leave `model` unchanged."""

    def allocations(
        self,
        entry: WeightEntry,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        num_pieces: int,
    ) -> Iterator[Allocation]:
        """Yield the allocation of the weight."""
        yield Allocation(num_bytes=entry.weight_bytes, part=WeightPart.WEIGHT)

    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return the weight unchanged."""
        return weight


METHOD = Unquantized()
