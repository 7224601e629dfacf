"""Count a model's parameters and bytes by kind, exactly, from the tensors it holds."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.quantization.kept import HEAD, ROUTER_NAME, holds_experts
from qlora_cli.quantization.report import KindCount

IN_EVERY_PRODUCT = "quantized in every product (int8_has_fp16_weight)"


@dataclass(frozen=True, kw_only=True)
class Entry:
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

    entries: tuple[Entry, ...]
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
        groups: dict[tuple[str, str | None], list[Entry]] = {}
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


def take_inventory(model: nn.Module, kept: Mapping[str, str]) -> Inventory:
    """Return the inventory of a loaded model; `kept` says why a linear layer is not quantized, by full name."""
    tables: set[int] = set()  # code tables may be shared between weights
    entries = []
    for name, module, parameter in parameters_once(model):
        states = _states(module, name, parameter)
        constants = sum(tensor.nbytes for tensor in _constants(states) if tensor.data_ptr() not in tables)
        tables |= {tensor.data_ptr() for tensor in _constants(states)}
        quantized = bool(states) or (isinstance(parameter, Int8Params) and parameter.dtype == torch.int8)
        shape = states[0].shape if states and isinstance(states[0], QuantState) else parameter.shape
        kind, why_not = classify(name, module, len(shape), kept)
        entries.append(
            Entry(
                name=name,
                kind=kind,
                why_not=None if quantized else (why_not or _why_not_asked(parameter)),
                num_parameters=prod(shape),
                weight_bytes=parameter.nbytes,
                constant_bytes=constants,
                dtype=dtype_name(parameter.dtype),
            )
        )
    return Inventory(entries=tuple(entries), buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()))


def _why_not_asked(parameter: nn.Parameter) -> str:
    return IN_EVERY_PRODUCT if isinstance(parameter, Int8Params) else "not asked for"


def classify(name: str, module: nn.Module, num_dims: int, kept: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the kind of a weight, and why it is not quantized; None for one that could be."""
    owner = name.rpartition(".")[0]
    if isinstance(module, nn.Embedding):
        return "embedding", "looked up, not multiplied"
    if num_dims < 2 or name.endswith("bias"):
        return "norms, biases, vectors", "small"
    if reason := kept.get(owner):
        return ("output head" if reason == HEAD else "linear layers"), reason
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "convolutions", "no matrix product"
    if ROUTER_NAME.search(owner):
        return "routers", "router"
    if holds_experts(name, module, num_dims):
        return "experts", kept.get(name)
    if isinstance(module, nn.Linear | Conv1D):
        return "linear layers", None
    return "other weights", "no linear layer"


def parameters_once(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield each parameter once with its owner; a parametrized one by the name it is read by."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        found: Iterable[tuple[str, nn.Parameter]] = module.named_parameters(recurse=False)
        chains = getattr(module, "parametrizations", {})
        found = [*found, *((name, chain.original) for name, chain in chains.items())]
        for name, parameter in found:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), module, parameter


def _states(module: nn.Module, name: str, parameter: nn.Parameter) -> list[QuantState | torch.Tensor]:
    """Return what a weight is dequantized with; nothing for one that is not quantized."""
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return [parameter.quant_state]
    if isinstance(parameter, Int8Params) and parameter.dtype == torch.int8:
        assert isinstance(module, Linear8bitLt)
        # They move from the weight to the layer's state at the first product.
        return [parameter.SCB if parameter.SCB is not None else module.state.SCB]
    chains: dict[str, Any] = dict(getattr(module, "parametrizations", {}))
    chain = chains.get(name.rpartition(".")[2], ())
    return [part.quant_state for part in chain if isinstance(part, Bnb4bitParametrization)]


def _constants(states: Iterable[QuantState | torch.Tensor]) -> Iterator[torch.Tensor]:
    for state in states:
        if isinstance(state, torch.Tensor):
            yield state
            continue
        yield state.absmax
        yield state.code
        if state.offset is not None:
            yield state.offset
        if state.state2 is not None:
            yield from _constants([state.state2])


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype as reports name it: `bfloat16`, `uint8`."""
    return str(dtype).removeprefix("torch.")
