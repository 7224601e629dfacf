"""What a quantization method answers: all that the rest of the project asks of one, and asks nowhere else.

A method is a module of this package that holds a `METHOD`, and an entry of `METHODS` in `settings/choices.py`.
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
from qlora_cli.quantization.entries import WeightEntry
from qlora_cli.quantization.lost_weights import Losses
from qlora_cli.settings.models import QuantizationSettings

META = torch.device("meta")
ORIGINAL = "Take the 16-bit model that it was made from; qlora quantizes that on loading."


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A weight of a loaded model as it is stored.

    Attributes:
        shape: Its shape as if nothing were packed.
        dtype: What it is read in.
        constants: What it is restored with; nothing for one that is not quantized.
        why_not: Why it is not quantized; None if it is.
    """

    shape: torch.Size
    dtype: torch.dtype
    constants: tuple[torch.Tensor, ...] = ()
    why_not: str | None = None


class WeightPart(Enum):
    """What an allocation holds."""

    WEIGHT = "weight"
    CODES = "codes"
    CONSTANTS = "constants"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Memory on a GPU that is taken while a weight is loaded; given back at the end if it is not kept."""

    num_bytes: int
    part: WeightPart
    is_kept: bool = True


@dataclass(frozen=True, slots=True)
class Inside:
    """Temporaries of one call on a GPU: those taken `before` its results and `after` them, in bytes."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    uses_cublas: bool = False


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What is known of an operator that computes with quantized weights, from the arguments that it is called with.

    Attributes:
        inside: What it takes besides its results.
        on_meta: What it returns on the meta device, where that depends on values that are not there.
    """

    inside: Callable[[tuple[Any, ...], dict[str, Any]], Inside]
    on_meta: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None


class ExpertStack(Protocol):
    """Stacked weights as training saw them."""

    def slice(self, index: int) -> torch.Tensor:
        """Return the part `(1, …)` along the first dimension."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Another value of the setting `quantization.<key>`, with which a method takes less, and its effect in words."""

    key: str
    value: object
    effect: str


class Method(ABC):
    """How weights are stored: planned from shapes, quantized while they are read, recognised, and restored.

    `settings` are always those that name this method.

    Attributes:
        loader: What transformers knows its quantizer by; None if it needs none.
        kept_key: The key of its config that holds the names of what is not quantized.
        stored_key: The key of bitsandbytes' config that says that a checkpoint is stored so; None for any other.
        stores_experts: Whether the fused experts of a layer can be stored so.
        layer_types: The layers that multiply with its weights, in place of linear ones.
        parametrization_types: What restores its weights elsewhere, whenever they are read.
        operators: What it computes with that takes memory besides its results, as `namespace::name`.
    """

    loader: str | None = None
    kept_key: str = "modules_to_not_convert"
    stored_key: str | None = None
    stores_experts: bool = False
    layer_types: tuple[type[nn.Module], ...] = ()
    parametrization_types: tuple[type[nn.Module], ...] = ()
    operators: Mapping[str, Operator] = MappingProxyType({})

    # How its settings are described.

    def describe(self, settings: QuantizationSettings) -> str:
        """Return in a few words how weights are stored: `NF4, double quantization`."""
        return settings.method.traits.label

    def savings(self, settings: QuantizationSettings) -> Iterable[Saving]:
        """Yield the settings by which this method would take less memory, what changes the model least first."""
        return ()

    # What it takes, from shapes alone.

    def unstorable(self, model: PreTrainedModel, device: torch.device) -> Mapping[str, str]:
        """Return the linear layers and fused experts that can't be stored on `device`, by full name, with why."""
        return {}

    @abstractmethod
    def entry(
        self, name: str, kind: str, shape: torch.Size, dtype: torch.dtype, settings: QuantizationSettings
    ) -> WeightEntry:
        """Return what a weight of `shape`, `(out, in)` or stacked, that comes in `dtype` takes as it is stored."""

    def transient_constant_bytes(self, settings: QuantizationSettings) -> float:
        """Return what the constants take for each weight while it is loaded, on top of what they take afterwards."""
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
        losses: Losses | None = None,
    ) -> QuantizationConfigMixin | None:
        """Return what `from_pretrained` takes; None to load weights as they are.

        `unquantized` are the layers that are not quantized, and `experts` the fused ones that are, by full name.
        """

    def refused_weights(self, config: QuantizationConfigMixin) -> Mapping[str, ModelError]:
        """Return the weights that were refused while a model was read by `config`, by full name, with why."""
        return {}

    def spills_to_host(self, settings: QuantizationSettings) -> bool:
        """Whether what does not fit on the GPU is kept on the CPU."""
        return False

    def check_placement(
        self, settings: QuantizationSettings, device: torch.device, *, offloads_embedding: bool
    ) -> None:
        """Raise a `HardwareError` or `ModelError` if weights can't be placed as asked."""

    def check_trainable(self, settings: QuantizationSettings) -> None:
        """Raise a `HardwareError` if a model that is stored so can be loaded, but not trained."""

    def settle(self, model: PreTrainedModel) -> None:
        """Change what a library would do to the weights of a loaded model later."""

    def measured_errors(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the relative error of each weight, by full name, that was measured while `model` was loaded."""
        return {}

    # Checkpoints that are stored so.

    def claim(self, quant_method: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the `quantization_config` of a checkpoint, completed, if it is stored by this method."""
        return None

    def stored_settings(self, config: Mapping[str, Any], name: str) -> dict[str, object]:
        """Return the settings that are baked into the weights of the checkpoint `name`, whose config was claimed.

        Raises:
            ModelError: it is of a kind that is not known here.
        """
        raise NotImplementedError(f"{type(self).__name__} claims no checkpoint")

    def free_settings(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Return the settings that a checkpoint was saved with, and that may be changed."""
        return {}

    def constant_names(self, name: str) -> tuple[str, ...]:
        """Return the tensors that must come with the packed weight `name` in a checkpoint."""
        return ()

    def weight_of_constant(self, name: str) -> str | None:
        """Return the weight that the tensor `name` of a checkpoint holds constants of; None if it looks like none."""
        return None

    def compute_as_asked(
        self,
        model: PreTrainedModel,
        settings: QuantizationSettings,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        """Make a model that was loaded to compute as it was saved compute as the settings say; `dtype` is its own."""

    def check_savable(self, settings: QuantizationSettings) -> None:
        """Check that a model that is stored so can be written as a quantized checkpoint.

        Raises:
            ModelError: it can't.
        """
        raise nothing_quantized()

    def extra_state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return the constants that `state_dict` leaves out, by the names of a checkpoint."""
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
        """Replace the weights of `model`, which is on the meta device, by what a run computes with."""

    @abstractmethod
    def allocations(
        self, entry: WeightEntry, settings: QuantizationSettings, dtype: torch.dtype, num_pieces: int
    ) -> Iterable[Allocation]:
        """Yield what is taken while a weight in `dtype` is loaded, in the order of birth; it is given back in reverse.

        The weight is read in `num_pieces`, one after another.
        """

    def held(self, module: nn.Module) -> Iterable[torch.Tensor]:
        """Yield the tensors, besides parameters and buffers, that `module` restores weights with."""
        return ()

    # As training saw it.

    @abstractmethod
    def round_trip(self, weight: torch.Tensor, settings: QuantizationSettings) -> torch.Tensor:
        """Return `weight`, `(out, in)` or stacked, quantized as a run does and restored as every pass does."""

    def is_divisible(self, num_weights: int) -> bool:
        """Whether stacked weights of `num_weights` each are quantized independently of one another."""
        return True

    def stacked(
        self, slices: Iterable[torch.Tensor], shape: torch.Size, settings: QuantizationSettings
    ) -> ExpertStack:
        """Return stacked weights of `shape`, given in slices, or as a whole where they are not divisible."""
        raise NotImplementedError(f"{type(self).__name__} stores no experts")

    def restored(
        self, name: str, codes: torch.Tensor, constants: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the weight `name` in `dtype`, which a checkpoint holds as `codes`; `constants` by their own names."""
        raise NotImplementedError(f"{type(self).__name__} claims no checkpoint")

    # What it refuses.

    def why_no_dora(self, layer: nn.Module) -> str | None:
        """Return in words why the magnitudes of `layer` can't be trained; None if they can, or it is another's."""
        return None


def nothing_quantized() -> ModelError:
    """Return the error for a model that is to be written quantized and is not."""
    return ModelError(
        "a quantized checkpoint is to be saved, and nothing is quantized",
        hint="Leave --save out.",
        setting="load.save",
    )
