"""Load an unquantized model of whose layers only the shards of one process are kept.

transformers converts each weight that a quantizer asks for as it is read, so this is one, which quantizes nothing.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.model_files.finite import is_finite, not_finite
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.refused_weights import RefusedWeights

LOADER = "qlora_shards"


@register_quantization_config(LOADER)
class ShardConfig(QuantizationConfigMixin):
    """The config of `ShardQuantizer`, which a model has only while it is loaded."""

    def __init__(self, shards: KeptShards) -> None:
        super().__init__(LOADER)  # type: ignore[arg-type] # their enumeration is of their own methods
        self.shards = shards
        self.refused = RefusedWeights()


@register_quantizer(LOADER)
class ShardQuantizer(HfQuantizer):
    """Keeps shards of the layers' weights as they are read."""

    quantization_config: ShardConfig

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a shard is kept of the weight."""
        return self.quantization_config.shards.is_of_layer(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that keeps the shard of one weight."""
        return _Keep(self.quantization_config)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave a model that is not quantized."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def is_serializable(self) -> bool:
        """Return whether the model could be saved so."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True


class _Keep(ConversionOps):
    """Keeps the shard of one weight."""

    def __init__(self, config: ShardConfig) -> None:
        self._config = config

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return placeholders for the weights of `input_dict`."""
        return {name: self._kept(name, value) for name, value in input_dict.items()}

    def _kept(self, name: str, value: Any) -> torch.Tensor:
        weight: torch.Tensor = value[0] if isinstance(value, list) else value
        with self._config.refused.recording(name):
            if not is_finite(weight):
                raise not_finite("holds ", weight.dtype)
        return self._config.shards.keep(name, weight.to(self._config.shards.device))
