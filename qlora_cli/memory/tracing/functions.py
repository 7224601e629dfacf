"""The behaviour of a GPU at the level of PyTorch's functions, above autograd: attention kernels, and autocast.

Autocast is a dispatch key of each device, and the meta device has none. Its rules are few and public; this module
applies them by the name of the function, at the same level as PyTorch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from qlora_cli.attention.sdpa_rules import choose_backend
from qlora_cli.hardware.device import AMPERE
from qlora_cli.memory.tracing.sdpa import attend
from qlora_cli.settings.choices import SdpaBackend

CUDA, META = "cuda", "meta"
MAYBE_AUTOCAST = "maybe_autocast"  # of transformers.utils.generic
# aten/src/ATen/autocast_mode.h, the lists for CUDA: functions that compute in 16 bit, in fp32, in fp32 unless a dtype
# is given, and in the widest dtype of their arguments.
IN_16_BIT = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv"),
    *("einsum", "conv1d", "conv2d", "conv3d", "chain_matmul", "prelu", "scaled_dot_product_attention"),
}
IN_FP32 = {
    *("pow", "__pow__", "rsqrt", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "softplus", "tan"),
    *("layer_norm", "group_norm", "norm", "nll_loss", "mse_loss", "logsumexp", "cross_entropy", "cosh", "sinh"),
    *("kl_div", "binary_cross_entropy_with_logits", "cosine_similarity", "cdist", "acos", "asin", "erfinv"),
}
IN_FP32_BY_DEFAULT = {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod", "linalg_norm"}
IN_WIDEST = {"cat", "stack", "addcmul", "addcdiv", "index_put", "scatter_add", "dot", "cross", "tensordot"}
HALF = (torch.float16, torch.bfloat16)
ATTENTION, GROUPED_MM, DROPOUT, SOFTMAX = "scaled_dot_product_attention", "_grouped_mm", "dropout", "softmax"
TREATED = frozenset({*IN_16_BIT, *IN_FP32, *IN_FP32_BY_DEFAULT, *IN_WIDEST, ATTENTION, GROUPED_MM, DROPOUT, SOFTMAX})


class GpuFunctions(TorchFunctionMode):
    """Calls functions unchanged, except for those that a GPU treats differently from the meta device.

    Attributes:
        backends: The attention kernels that were chosen so far.
    """

    def __init__(
        self, capability: tuple[int, int], *, backend: SdpaBackend = SdpaBackend.AUTO, dtype: torch.dtype | None = None
    ) -> None:
        """Act as a GPU of `capability`; `dtype` is what autocast computes in, None without autocast."""
        super().__init__()
        self.backends: set[SdpaBackend] = set()
        self._capability = capability
        self._backend = backend
        self._dtype = dtype
        self._enabled_before: list[bool] = []
        # The 16-bit copies of trained weights, for one pass; the reference to the weight prevents reuse of its id.
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def autocast(self, *, enabled: bool = True) -> Iterator[None]:
        """Enable autocast within the context by setting the flag for CUDA, which PEFT reads."""
        if self._dtype is None:
            yield
            return
        before, dtype_before = torch.is_autocast_enabled(CUDA), torch.get_autocast_dtype(CUDA)
        torch.set_autocast_enabled(CUDA, enabled)
        for device_type in (CUDA, META):  # some code reads the dtype for the device that a tensor is on
            torch.set_autocast_dtype(device_type, self._dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled(CUDA, before)
            torch.set_autocast_dtype(CUDA, dtype_before)
            if not before:
                self._casts.clear()

    def disable_autocast_hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Disable autocast in modules whose code disables it on a GPU, as rotary embeddings and routers do.

        transformers' `maybe_autocast` does nothing on the meta device, so autocast is off for the whole forward pass
        of such a module.
        """
        if self._dtype is None:
            return []
        hooks: list[RemovableHandle] = []
        for module in model.modules():
            if MAYBE_AUTOCAST in _names_used(type(module)):
                hooks.append(module.register_forward_pre_hook(self._disable))
                hooks.append(module.register_forward_hook(self._restore, always_call=True))
        return hooks

    def _disable(self, *_: Any) -> None:
        self._enabled_before.append(torch.is_autocast_enabled(CUDA))
        torch.set_autocast_enabled(CUDA, False)

    def _restore(self, *_: Any) -> None:
        torch.set_autocast_enabled(CUDA, self._enabled_before.pop())

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in TREATED:  # most are attributes of tensors
            return func(*args, **kwargs)
        if self._dtype is not None and torch.is_autocast_enabled(CUDA):
            args, kwargs = self._autocast_arguments(name, args, kwargs)
        if name == ATTENTION:
            return self._attend(*args, **kwargs)
        if name == GROUPED_MM and args[0].device.type == META:
            return self._grouped_mm(func, *args, **kwargs)
        if name == DROPOUT and kwargs.get("p", 0.0) > 0 and kwargs.get("training", True):
            # aten/src/ATen/native/Dropout.cpp: one kernel on CUDA, which saves a mask of one byte an element.
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        if name == SOFTMAX and kwargs.get("dtype") == torch.float32 and args[0].dtype == torch.float16:
            # aten/src/ATen/native/SoftMax.cpp: on CUDA, from fp16 to fp32 in one kernel (`half_to_float`).
            return torch.ops.aten._softmax(args[0], *args[1:2], *([kwargs["dim"]] if "dim" in kwargs else []), True)
        return func(*args, **kwargs)

    def _autocast_arguments(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the function `name`, cast as autocast does: not where it writes into `out`."""
        if kwargs.get("out") is not None:
            return args, kwargs
        if name in IN_16_BIT:
            return _mapped(self._to_16_bit, args, kwargs)
        if name in IN_FP32:
            return _mapped(_to_fp32, args, kwargs)
        if name in IN_FP32_BY_DEFAULT and kwargs.get("dtype") is None and _is_half(args[0]):
            return args, {**kwargs, "dtype": torch.float32}
        if name in IN_WIDEST and _is_mixed((*args, *kwargs.values())):
            return _mapped(_to_fp32, args, kwargs)
        return args, kwargs

    def _to_16_bit(self, value: Any) -> Any:
        assert self._dtype is not None
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, *HALF):
            return value
        if value.dtype == self._dtype:
            return value
        if not (value.dtype == torch.float32 and value.requires_grad and value.is_leaf):
            return value.to(self._dtype)
        # A trained weight is cast once in a pass, and the copy lives until its end (`cached_cast`).
        if id(value) not in self._casts:
            self._casts[id(value)] = (value, value.to(self._dtype))
        return self._casts[id(value)][1]

    def _grouped_mm(
        self, func: Any, rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Return the products of experts as a GPU computes them in their dtype; the meta device supports only bf16."""
        result: torch.Tensor
        if self._capability < AMPERE:  # transformers.integrations.moe, `_can_use_grouped_mm`
            result = torch.ops.transformers.grouped_mm_fallback(rows, weights, offs)
        elif rows.dtype == torch.bfloat16:
            result = func(rows, weights, offs=offs, **options)
        else:
            products: Any = _GroupedProducts.apply
            result = products(rows, weights, offs)
        return result

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        backend = self._backend
        if backend == SdpaBackend.AUTO:
            backend = choose_backend(
                query,
                key,
                value,
                has_mask=attn_mask is not None,
                enable_gqa=enable_gqa,
                capability=self._capability,
                dropout=dropout_p,
            )
        self.backends.add(backend)
        return attend(
            backend,
            query,
            key,
            value,
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


class _GroupedProducts(torch.autograd.Function):
    """`_grouped_mm` of `(rows, in)` and `(experts, in, out)` in any dtype, which allocates only its results."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """Return the products, `(rows, out)`; `offs` is the index at which the rows of each expert end."""
        of_rows, of_weights, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weights else None, weights if of_rows else None, offs)
        ctx.shape = weights.shape
        result: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weights, offs)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients that autograd needs."""
        saved_rows, saved_weights, saved_offs = ctx.saved_tensors
        of_rows, of_weights, _ = ctx.needs_input_grad
        gradient_of_weights = gradient.new_empty(ctx.shape) if of_weights else None  # first, as in PyTorch
        gradient_of_rows = None
        if of_rows:
            gradient_of_rows = torch.ops.transformers.grouped_mm_fallback(gradient, saved_weights.mT, saved_offs)
        del saved_rows, saved_offs, saved_weights  # released here and in this order, as in PyTorch
        return gradient_of_rows, gradient_of_weights, None


def _names_used(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names in the code of a class's forward pass, without its decorators."""
    code = getattr(unwrap(kind.forward), "__code__", None)
    return code.co_names if code is not None else ()


def _mapped(
    cast: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a function with each value cast, also those in lists of tensors."""
    cast_args = tuple([_mapped_value(cast, value) for value in args])
    return cast_args, {name: _mapped_value(cast, value) for name, value in kwargs.items()} if kwargs else kwargs


def _mapped_value(cast: Callable[[Any], Any], value: Any) -> Any:
    kind = type(value)
    return kind([cast(part) for part in value]) if kind in (list, tuple) else cast(value)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _to_fp32(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def _is_mixed(values: Iterable[Any]) -> bool:
    """Return whether there are tensors in fp32 and in 16 bit among `values` and in their lists."""
    dtypes = {
        tensor.dtype
        for value in values
        for tensor in (value if isinstance(value, list | tuple) else (value,))
        if isinstance(tensor, torch.Tensor)
    }
    return torch.float32 in dtypes and not dtypes.isdisjoint(HALF)
