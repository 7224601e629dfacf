"""The interface of a quantization method: everything that the rest of the project needs to know about one.

A method is a module of this package with a `METHOD`, and an entry of `METHODS` in `settings/choices.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.errors import ModelError
from qlora_cli.quantization.calibrated_blocks import WeightSlice
from qlora_cli.quantization.calibrated_weights import CalibratedWeights
from qlora_cli.quantization.entries import WeightEntry
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.methods.fused_product import FusedProduct
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.settings.models import QuantizationSettings

META = torch.device("meta")
ORIGINAL = "Use the 16-bit model that it was made from; qlora quantizes that on loading."


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A weight of a loaded model as it is stored.

    Attributes:
        shape: Its shape as if nothing were packed.
        dtype: The dtype that it is dequantized to.
        constants: The tensors that it is dequantized with; empty if it is not quantized.
        why_not: Why it is not quantized; None if it is.
    """

    shape: torch.Size
    dtype: torch.dtype
    constants: tuple[torch.Tensor, ...] = ()
    why_not: str | None = None


class WeightPart(Enum):
    """The part of a weight that an allocation holds."""

    WEIGHT = "weight"
    CODES = "codes"
    CONSTANTS = "constants"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Memory that is allocated on a GPU while a weight is loaded; freed at the end unless persistent."""

    num_bytes: int
    part: WeightPart
    is_persistent: bool = True


@dataclass(frozen=True, slots=True)
class Temporaries:
    """Temporaries of one call on a GPU in bytes: those allocated `before` its results, and those `after` them."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    uses_cublas: bool = False


@dataclass(frozen=True, kw_only=True)
class Operator:
    """The memory of an operator that computes with quantized weights, as functions of its arguments.

    Attributes:
        temporaries: Its memory in addition to its results.
        on_meta: Its results on the meta device, if they depend on values, which meta tensors lack.
    """

    temporaries: Callable[[tuple[Any, ...], dict[str, Any]], Temporaries]
    on_meta: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None


class ExpertStack(Protocol):
    """Stacked weights, dequantized as in training."""

    def slice(self, index: int) -> torch.Tensor:
        """Return the slice `(1, …)` along the first dimension."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A value of the setting `quantization.<key>` that needs less memory, and its effect in words."""

    key: str
    value: object
    effect: str


class Method(ABC):
    """A way to store weights: planned from shapes, quantized on loading, recognised in checkpoints, and dequantized.

    `settings` are always those that name this method.

    Attributes:
        loader: The name of its quantizer in transformers; None if it needs none.
        skip_modules_key: The key of its config with the names of the modules that are not quantized.
        stored_key: The key of bitsandbytes' config that marks a checkpoint as stored so; None for any other.
        stores_experts: Whether the fused experts of a layer can be stored so.
        is_calibratable: Whether codes can be chosen by what a weight is multiplied with.
        layer_types: The layers that replace linear ones and multiply with its weights.
        parametrization_types: The parametrizations that dequantize its weights elsewhere, whenever they are read.
        operators: Its operators that allocate temporaries, as `namespace::name`.
        products: Its operators that multiply by a weight, whose results selective checkpointing keeps.
        fused_products: How its layers multiply together with an adapter, by type of layer; empty if they can't.
    """

    loader: str | None = None
    skip_modules_key: str = "modules_to_not_convert"
    stored_key: str | None = None
    stores_experts: bool = False
    is_calibratable: bool = False
    layer_types: tuple[type[nn.Module], ...] = ()
    parametrization_types: tuple[type[nn.Module], ...] = ()
    operators: Mapping[str, Operator] = MappingProxyType({})
    products: frozenset[str] = frozenset()
    fused_products: Sequence[FusedProduct] = ()

    # How its settings are described.

    def describe(self, settings: QuantizationSettings) -> str:
        """Describe in a few words how weights are stored: `NF4, double quantization`."""
        return settings.method.traits.label

    def savings(self, settings: QuantizationSettings) -> Iterable[Saving]:
        """Yield settings with which this method needs less memory, those that change the model least first."""
        return ()

    # Its size, from shapes alone.

    def unsupported_weights(self, model: PreTrainedModel, device: torch.device) -> Mapping[str, str]:
        """Return the layers and fused experts that can't be stored on `device`, by full name, with the reason."""
        return {}

    @abstractmethod
    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return the bytes of a weight of `shape`, `(out, in)` or stacked, whose checkpoint has `dtype`, as stored."""

    def transient_constant_bytes(self, settings: QuantizationSettings) -> float:
        """Return the bytes per weight that the constants need while loading, in addition to those afterwards."""
        return 0.0

    def stored(self, module: nn.Module, name: str, parameter: nn.Parameter) -> StoredWeight | None:
        """Return how `parameter` of `module`, read as the attribute `name`, is stored; None if not by this method."""
        return None

    # How it is loaded.

    @abstractmethod
    def config(
        self,
        settings: QuantizationSettings,
        *,
        unquantized: Sequence[str],
        experts: Sequence[str],
        compute_dtype: torch.dtype,
        measure_error: bool = False,
        residuals: QuantizationResiduals | None = None,
        shards: KeptShards | None = None,
        calibrated: CalibratedWeights | None = None,
    ) -> QuantizationConfigMixin | None:
        """Return the config for `from_pretrained`; None to load weights unchanged.

        `unquantized` are the layers that are not quantized, and `experts` the fused ones that are, by full name.
        `shards` keeps those of the weights, for one of several processes.
        """

    def calibrate(
        self, slices: Sequence[WeightSlice], shape: torch.Size, settings: QuantizationSettings
    ) -> tuple[torch.Tensor, Any]:
        """Return the codes of a weight of `shape`, chosen by the moments of its inputs, and what restores them."""
        raise NotImplementedError(f"{type(self).__name__} is not calibratable")

    def refused_weights(self, config: QuantizationConfigMixin) -> Mapping[str, ModelError]:
        """Return the errors of weights that were refused while a model was loaded with `config`, by full name."""
        return {}

    def offloads_to_cpu(self, settings: QuantizationSettings) -> bool:
        """Return whether weights that do not fit on the GPU stay on the CPU."""
        return False

    def check_placement(
        self, settings: QuantizationSettings, device: torch.device, *, offloads_embedding: bool
    ) -> None:
        """Raise a `HardwareError` or `ModelError` if weights can't be placed as requested."""

    def check_trainable(self, settings: QuantizationSettings) -> None:
        """Raise a `HardwareError` if a model that is stored so can be loaded, but not trained."""

    def finalize(self, model: PreTrainedModel) -> None:
        """Prevent what a library would do to the weights of a loaded model later."""

    def measured_errors(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the relative error of each weight, by full name, that was measured while `model` was loaded."""
        return {}

    # Checkpoints that are stored so.

    def claim(self, quant_method: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the `quantization_config` of a checkpoint, completed, if it is stored by this method."""
        return None

    def stored_settings(self, config: Mapping[str, Any], name: str) -> dict[str, object]:
        """Return the settings that the weights of the checkpoint `name`, whose config was claimed, fix.

        Raises:
            ModelError: it is of an unknown kind.
        """
        raise NotImplementedError(f"{type(self).__name__} claims no checkpoint")

    def free_settings(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return the settings that a checkpoint was saved with and that may be changed."""
        return {}

    def constant_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that must accompany the packed weight `name` in a checkpoint."""
        return ()

    def weight_of_constant(self, name: str) -> str | None:
        """Return the weight whose constants the tensor `name` of a checkpoint holds; None if it holds none."""
        return None

    def apply_compute_settings(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        """Apply the settings to a model that was loaded to compute as it was saved; `dtype` is that of the model."""

    def check_savable(self, settings: QuantizationSettings) -> None:
        """Check that a model that is stored so can be saved as a quantized checkpoint.

        Raises:
            ModelError: it can't.
        """
        raise nothing_quantized()

    def extra_state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return the constants that `state_dict` omits, by their names in a checkpoint."""
        return {}

    # Its memory.

    @abstractmethod
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
        """Replace the weights of `model`, which is on the meta device, by those that a run computes with."""

    @abstractmethod
    def allocations(
        self, entry: WeightEntry, settings: QuantizationSettings, dtype: torch.dtype, num_pieces: int
    ) -> Iterable[Allocation]:
        """Yield the allocations of loading a weight in `dtype`, in order; they are freed in reverse.

        The weight is read in `num_pieces`, one after another.
        """

    def auxiliary_tensors(self, module: nn.Module) -> Iterable[torch.Tensor]:
        """Yield the tensors of `module` for dequantizing that are neither parameters nor buffers."""
        return ()

    # Its weights as in training.

    @abstractmethod
    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return `weight`, `(out, in)` or stacked, quantized as in a run and dequantized as in every pass."""

    def is_divisible(self, num_weights: int) -> bool:
        """Return whether stacked weights of `num_weights` each are quantized independently of one another."""
        return True

    def stacked(
        self, slices: Iterable[torch.Tensor], shape: torch.Size, settings: QuantizationSettings
    ) -> ExpertStack:
        """Quantize stacked weights of `shape`, given in slices, or as a whole if they are not divisible."""
        raise NotImplementedError(f"{type(self).__name__} stores no experts")

    def restored(
        self, name: str, codes: torch.Tensor, constants: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the weight `name` in `dtype`, dequantized from its `codes` and `constants` in a checkpoint."""
        raise NotImplementedError(f"{type(self).__name__} claims no checkpoint")

    def held_weight(self, layer: nn.Module) -> torch.Tensor | None:
        """Return the weight of `layer`, dequantized, without an effect on it; None if it is not stored so."""
        return None

    # What it refuses.

    def dora_problem(self, layer: nn.Module) -> str | None:
        """Return in words why DoRA can't train the magnitudes of `layer`; None if it can."""
        return None


def nothing_quantized() -> ModelError:
    """Return the error for saving a quantized checkpoint of an unquantized model."""
    return ModelError(
        "a quantized checkpoint is to be saved, and nothing is quantized",
        hint="Leave --save out.",
        setting="load.save",
    )
