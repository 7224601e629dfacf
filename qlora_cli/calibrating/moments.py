"""Sum up the second moments of what the weights of a layer are multiplied with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qlora_cli.quantization.calibrated_blocks import InputMoments

FLOAT_BYTES = 4
LINEAR = nn.functional.linear
PRODUCTS = (
    *(torch.matmul, torch.mm, torch.bmm),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm),
)


class MomentSums:
    """Sums by the full name of a linear layer's weight, and for stacked experts by name and number.

    Layers with the same input share a sum.
    """

    def __init__(self, layers: Mapping[str, nn.Module], experts: Mapping[str, torch.Tensor]) -> None:
        self._layers, self._experts = layers, experts
        self._sums: dict[tuple[str, int], InputMoments] = {}
        self._owners: dict[str, str] = {}
        self._transposed: set[str] = set()
        self._mask: torch.Tensor | None = None
        self._last: tuple[torch.Tensor, str] | None = None

    def begin(self, mask: torch.Tensor) -> None:
        """Begin a batch; `mask`, `(rows, seq)`, is true for the tokens that count."""
        self._mask, self._last = mask, None

    def of(self, name: str, expert: int = 0) -> InputMoments | None:
        """Return the moments for a weight, or for one expert of a stacked one; None if nothing was multiplied."""
        return self._sums.get((self._owners.get(name, name), expert))

    def is_transposed(self, name: str) -> bool:
        """Return whether experts are stored as `(in, out)`."""
        return name in self._transposed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum up while the layers run."""
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._add_input(name, inputs[0]))
            for name, layer in self._layers.items()
        ]
        try:
            with _Products(self._experts, self._add_expert):
                yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()

    def _add_input(self, name: str, inputs: torch.Tensor) -> None:
        """Add an input of a layer, `(rows, seq, in)`; layers with the same input follow one another."""
        if self._last is not None and self._last[0] is inputs:
            self._owners.setdefault(name, self._last[1])
        owner = self._owners.setdefault(name, name)
        self._last = (inputs, owner)
        if owner == name:
            tokens = inputs.reshape(-1, inputs.shape[-1])
            if self._mask is not None and len(tokens) == self._mask.numel():
                tokens = tokens[self._mask.reshape(-1).to(tokens.device)]
            self._add(name, 0, tokens)

    def _add_expert(self, name: str, expert: int, tokens: torch.Tensor, *, is_transposed: bool) -> None:
        if is_transposed:
            self._transposed.add(name)
        self._add(name, expert, tokens[tokens.any(-1)])  # zeros stand for tokens of other experts

    def _add(self, name: str, expert: int, tokens: torch.Tensor) -> None:
        values, is_narrow = tokens.float(), tokens.dtype.itemsize < FLOAT_BYTES
        known = self._sums.get((name, expert))
        if known is None:
            width = values.shape[1]
            known = InputMoments(matrix=torch.zeros(width, width, device=values.device), num_tokens=0)
        with _narrow_products(tokens.dtype) if is_narrow else nullcontext():
            matrix = known.matrix.addmm_(values.T, values)
        self._sums[name, expert] = InputMoments(matrix=matrix, num_tokens=known.num_tokens + len(values))


@contextmanager
def _narrow_products(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 values that were of `dtype` be multiplied as what holds their bits: TF32 on a GPU, bf16 on a CPU."""
    cuda = torch.backends.cuda.matmul
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when it is imported
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = "tf32"
    if dtype == torch.bfloat16:
        cpu.fp32_precision = "bf16"
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


class _Products(TorchFunctionMode):
    """Reports the products with stacked weights, expert by expert, to `add`."""

    def __init__(self, experts: Mapping[str, torch.Tensor], add: Callable[..., None]) -> None:
        super().__init__()
        self._names = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in experts.items()}
        self._add = add

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._names and len(args) > 1 and (func is LINEAR or func in PRODUCTS):
            known = self._names.get(args[1].untyped_storage().data_ptr())
            if known is not None:
                self._report(*known, *args[:2], is_linear=func is LINEAR)
        return func(*args, **(kwargs or {}))

    def _report(
        self, name: str, stacked: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, *, is_linear: bool
    ) -> None:
        # Whether the features of the input are apart in memory, and not those of the output.
        is_transposed = weight.stride(-1 if is_linear else -2) != 1
        first = (weight.storage_offset() - stacked.storage_offset()) // stacked.stride(0)
        several = inputs if weight.dim() == 3 else inputs[None]
        for number, tokens in enumerate(several):
            flat = tokens.reshape(-1, tokens.shape[-1])
            self._add(name, first + number, flat, is_transposed=is_transposed)
