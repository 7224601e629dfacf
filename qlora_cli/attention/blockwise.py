"""The attention that a model itself defines, for one block of queries at a time: no tensor has all scores.

For models whose attention no kernel of PyTorch computes, because it adds a sink to the scores (gpt-oss) or caps them
(Gemma 2). Each query's result depends on its own row of scores only, so the model's own function computes the blocks,
and the result is the same. Neither does the backward pass hold more: it computes each block again (Rabe and Staats
2021, "Self-attention does not need O(n²) memory"). Keys that a block can't see, because they come later or lie before
a sliding window, are left out.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from qlora_cli.settings.choices import Attention

EAGER = "eager_attention_forward"  # the name of a model's own attention, in its module of transformers
# A block has at most this many scores, 128 MiB of them in 16 bit; a model's function holds a few such tensors.
MAX_SCORES = 2**26
MIN_ROWS = 64  # and at least this many queries, so that the products are large enough for a GPU
# With a sliding window the more keys are superfluous, the longer a block, and the more blocks, the shorter.
WINDOW_ROWS = 512
AUTOCAST_DEVICES = ("cuda", "cpu")

Attend = Callable[..., tuple[torch.Tensor, Any]]


def has_own_attention(model: nn.Module) -> bool:
    """Return whether the attention of `model` is a function that blocks can be computed by."""
    return hasattr(sys.modules[type(model).__module__], EAGER)


def register_blockwise() -> None:
    """Make it known to transformers, under the name of the setting; no file has it.

    PyTorch's compiler leaves it out: it can't follow a backward pass that computes gradients itself.
    """
    uncompiled = torch.compiler.disable(blockwise_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(Attention.BLOCKWISE.value, uncompiled)
    AttentionMaskInterface.register(Attention.BLOCKWISE.value, mask_by_block)


@dataclass(frozen=True)
class _Block:
    """The queries from `start` to `end`, and the keys that they may attend to; the ends are exclusive."""

    start: int
    end: int
    first_key: int
    last_key: int

    def of(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the block's part of each, `(batch, heads, seq, head_dim)`, as views."""
        keys = slice(self.first_key, self.last_key)
        return query[:, :, self.start : self.end], key[:, :, keys], value[:, :, keys]


@dataclass(frozen=True, kw_only=True)
class CausalMask:
    """A mask of `num_queries` by `num_keys` that is made block by block.

    `first_query` and `first_key` are their positions in the whole sequence. A query attends to itself and to earlier
    keys, to fewer than `window` positions back if that is given.
    """

    arguments: dict[str, Any]
    first_query: int
    first_key: int
    num_keys: int
    window: int | None

    def keys_of(self, start: int, end: int) -> tuple[int, int]:
        """Return the first key, and the one after the last, that the queries from `start` to `end` attend to."""
        offset = self.first_query - self.first_key
        first = 0 if self.window is None else max(0, start + offset - self.window + 1)
        return first, min(self.num_keys, end + offset)

    def block(self, block: _Block) -> torch.Tensor:
        """Return the mask of a block, `(batch, 1, queries, keys)`, which is added to the scores."""
        mask: torch.Tensor = eager_mask(
            q_length=block.end - block.start,
            kv_length=block.last_key - block.first_key,
            q_offset=self.first_query + block.start,
            kv_offset=self.first_key + block.first_key,
            **self.arguments,
        )
        return mask


def mask_by_block(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    local_size: int | None = None,
    use_vmap: bool = False,
    **arguments: Any,
) -> CausalMask | torch.Tensor | None:
    """Return the mask of eager attention, in the form in which `AttentionMaskInterface` calls for it."""
    is_causal = "allow_is_bidirectional_skip" not in arguments and not use_vmap
    if not is_causal or isinstance(q_offset, torch.Tensor):
        offsets: Any = {"q_offset": q_offset, "kv_offset": kv_offset}
        mask: torch.Tensor | None = eager_mask(
            q_length=q_length, kv_length=kv_length, use_vmap=use_vmap, **offsets, **arguments
        )
        return mask
    return CausalMask(
        arguments=arguments, first_query=q_offset, first_key=kv_offset, num_keys=kv_length, window=local_size
    )


def blockwise_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: CausalMask | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return what the model's own attention does, `(batch, seq, heads, head_dim)`.

    `query` is `(batch, heads, seq, head_dim)`; `key` and `value` have as many heads or fewer.
    """
    call = _Call(module, query, key, attention_mask, options)
    inputs = (query, key, value, *call.trained)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        function: Any = _Blockwise.apply
        return function(call, *inputs), None
    return call.result(query, key, value), None


class _Blockwise(torch.autograd.Function):
    """Attention by blocks, of which the backward pass needs only queries, keys and values."""

    @staticmethod
    def forward(ctx: Any, call: "_Call", *inputs: torch.Tensor) -> torch.Tensor:
        """Return the result of `call`; `inputs` are queries, keys, values, and what else is trained."""
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return call.result(*inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs, from each block computed again."""
        return None, *ctx.call.gradients(gradient, *ctx.saved_tensors[:3])


class _Call:
    """One call of a model's own attention: the function, its arguments, and the blocks that it is computed in.

    Attributes:
        trained: What needs a gradient in addition to queries, keys and values: parameters of the module, such as
            sinks, and tensors among the options.
    """

    def __init__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: CausalMask | torch.Tensor | None,
        options: dict[str, Any],
    ) -> None:
        self._module, self._mask, self._options = module, mask, options
        self._function: Attend = getattr(sys.modules[type(module).__module__], EAGER)
        self._blocks = _blocks(query, key, mask)
        self._parameters = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        self._trained_options = [
            name for name, option in options.items() if isinstance(option, torch.Tensor) and option.requires_grad
        ]
        self.trained = [*self._parameters, *(options[name] for name in self._trained_options)]
        self._autocast = _autocast_state()
        self._random = _random_state(query.device) if module.training and options.get("dropout") else None

    def result(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the result, `(batch, seq, heads, head_dim)`."""
        result: torch.Tensor | None = None
        for block in self._blocks:
            part = self._attend(block, block.of(query, key, value), self._options)
            if result is None:
                result = part.new_empty((part.shape[0], query.shape[2], *part.shape[2:]))
            result[:, block.start : block.end] = part
        assert result is not None, "there is no call without a query"
        return result

    def gradients(
        self, gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Return the gradients of queries, keys, values and `trained`, given that of the result.

        Keys and values collect theirs from many blocks, so the sums are in fp32.
        """
        of_query = torch.empty_like(query)
        of_key, of_value = _sum_like(key), _sum_like(value)
        of_trained: list[torch.Tensor | None] = [None] * len(self.trained)
        with _autocast(self._autocast), _replayed(self._random, query.device):
            for block in self._blocks:
                own = [part.detach().requires_grad_() for part in block.of(query, key, value)]
                options = {name: self._options[name].detach().requires_grad_() for name in self._trained_options}
                with torch.enable_grad():
                    part = self._attend(block, own, {**self._options, **options})
                inputs = [*own, *self._parameters, *options.values()]
                found = torch.autograd.grad(part, inputs, gradient[:, block.start : block.end], allow_unused=True)
                del part
                of_query[:, :, block.start : block.end] = found[0]
                of_key[:, :, block.first_key : block.last_key] += found[1]
                of_value[:, :, block.first_key : block.last_key] += found[2]
                of_trained = [_added(total, more) for total, more in zip(of_trained, found[3:], strict=True)]
        return [of_query, of_key.to(key.dtype), of_value.to(value.dtype), *of_trained]

    def _attend(self, block: _Block, inputs: Sequence[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        mask = self._mask
        if isinstance(mask, CausalMask):
            mask = mask.block(block)
        elif mask is not None:
            mask = mask[:, :, block.start : block.end]
        return self._function(self._module, *inputs, mask, **options)[0]


def _sum_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _added(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    return total if more is None else more if total is None else total + more


def _blocks(query: torch.Tensor, key: torch.Tensor, mask: CausalMask | torch.Tensor | None) -> list[_Block]:
    batch, heads, num_queries, _ = query.shape
    most_scores = MAX_SCORES // (batch * heads)
    blocks, start = [], 0
    while start < num_queries:
        if isinstance(mask, CausalMask):
            first_key, last_key = mask.keys_of(start, start + 1)
            rows = _rows_within(most_scores, last_key - first_key)
            if mask.window is not None:
                rows = min(rows, max(mask.window, WINDOW_ROWS))
        else:
            rows = most_scores // key.shape[2]
        end = min(num_queries, start + max(MIN_ROWS, rows // MIN_ROWS * MIN_ROWS))
        first_key, last_key = mask.keys_of(start, end) if isinstance(mask, CausalMask) else (0, key.shape[2])
        blocks.append(_Block(start, end, first_key, last_key))
        start = end
    return blocks


def _rows_within(most_scores: int, num_keys: int) -> int:
    """Return how many queries have `most_scores` together, if the first sees `num_keys` and each one more."""
    return (math.isqrt(num_keys**2 + 4 * most_scores) - num_keys) // 2


_AutocastState = tuple[tuple[str, bool, torch.dtype], ...]


def _autocast_state() -> _AutocastState:
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in AUTOCAST_DEVICES
    )


@contextmanager
def _autocast(state: _AutocastState) -> Iterator[None]:
    """Compute with autocast as it was, whose own context a trace without a GPU can't enter."""
    before = _autocast_state()
    _set_autocast(state)
    try:
        yield
    finally:
        _set_autocast(before)


def _set_autocast(state: _AutocastState) -> None:
    for device, is_enabled, dtype in state:
        torch.set_autocast_enabled(device, is_enabled)
        torch.set_autocast_dtype(device, dtype)


def _random_state(device: torch.device) -> torch.Tensor | None:
    """Return the state of the generator of `device`; None for tensors without values."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state() if device.type == "cpu" else None


@contextmanager
def _replayed(state: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers as from `state`."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
