"""Time kernels by themselves: dequantization against a plain copy, products, attention over rows of many lengths.

What is measured is what decides about code of our own. If dequantization reaches a small share of the bandwidth of a
copy, a kernel with a result buffer of its own is worth writing. If cuDNN's attention takes long for each new length,
training should go on without it.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.synthetic import SHAPES, Shape, tensor_shapes

NUM_TOKENS = 2048
NUM_LENGTHS = 40
LONGEST = 2048
REPEATS = 20
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**24}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of one weight: the code, its block's constant in 8 bits, and theirs
NF4_BYTES_SINGLE = 1 / 2 + 4 / 64


def measure_kernels(device: torch.device, shape: Shape) -> dict[str, Any]:
    """Return the figures of all kernels, for a layer of `shape`; times in seconds, rates in bytes or FLOPs/s."""
    copy_rate = _copy_rate(device)
    return {
        "copy_bytes_per_second": copy_rate,
        "layer": _layer(device, shape, copy_rate),
        "attention": _attention(device, shape),
    }


def kernels_of(device: str) -> dict[str, Any]:
    """Return the figures for a layer of Llama-3.1-8B, on a CPU for a tiny one."""
    return measure_kernels(torch.device(device), SHAPES["8b" if device == "cuda" else "tiny"])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median seconds of `work` on the device, after two runs that are not counted.

    On a GPU by events, between which nothing else is launched; `work` has to keep the GPU busy longer than the host
    takes to launch it.
    """
    for _ in range(2):
        work()
    _synchronize(device)
    if device.type != "cuda":
        return statistics.median(_wall_seconds(work) for _ in range(repeats))
    marks = [(_event(), _event()) for _ in range(repeats)]
    for before, after in marks:
        before.record()
        work()
        after.record()
    _synchronize(device)
    return statistics.median(float(before.elapsed_time(after)) for before, after in marks) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _copy_rate(device: torch.device) -> float:
    """Return bytes read plus bytes written a second, by a copy many times larger than any cache."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(device, lambda: target.copy_(source))


def _layer(device: torch.device, shape: Shape, copy_rate: float) -> dict[str, Any]:
    """Return the seconds to dequantize the linear weights of a layer, and to multiply by them."""
    sizes = [
        size for name, size in tensor_shapes(shape).items() if name.startswith("model.layers.0.") and len(size) == 2
    ]
    num_weights = sum(rows * columns for rows, columns in sizes)
    weights = [torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes]
    inputs = {columns: torch.randn(NUM_TOKENS, columns, device=device, dtype=torch.bfloat16) for _, columns in sizes}
    product_seconds = seconds_of(device, lambda: [inputs[one.shape[1]] @ one.T for one in weights])
    figures: dict[str, Any] = {
        "num_weights": num_weights,
        "num_tokens": NUM_TOKENS,
        "product_seconds": product_seconds,
        "product_flops_per_second": 2 * NUM_TOKENS * num_weights / product_seconds,
    }
    buffers = [torch.empty_like(one) for one in weights]
    for name, is_double, weight_bytes in (("double", True, NF4_BYTES), ("single", False, NF4_BYTES_SINGLE)):
        stored = [quantize_4bit(one, quant_type="nf4", compress_statistics=is_double) for one in weights]
        ways: dict[str, Sequence[torch.Tensor | None]] = {name: [None] * len(stored)}
        if device.type == "cuda":  # there is no such kernel for a CPU
            ways[f"{name}_into_buffer"] = buffers
        for way, results in ways.items():
            seconds = seconds_of(device, partial(_dequantize, stored, results))
            rate = num_weights * (weight_bytes + 2) / seconds
            figures[f"dequantize_{way}"] = {
                "seconds": seconds,
                "bytes_per_second": rate,
                "share_of_copy": rate / copy_rate,
                "share_of_product": seconds / product_seconds,
            }
    return figures


def _dequantize(stored: Sequence[tuple[torch.Tensor, Any]], results: Sequence[torch.Tensor | None]) -> None:
    for (codes, state), result in zip(stored, results, strict=True):
        dequantize_4bit(codes, state, out=result)


def lengths() -> list[int]:
    """Return lengths of rows that differ from one another, none a multiple of what kernels like."""
    return [LONGEST * index // NUM_LENGTHS - 3 for index in range(NUM_LENGTHS, 0, -1)]


@contextmanager
def _cudnn_attention(is_enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(is_enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _attention(device: torch.device, shape: Shape) -> dict[str, Any]:
    """Return the seconds of attention, forward and backward, of each length when it is new and when it is not."""
    figures: dict[str, Any] = {"lengths": lengths()}
    for name, is_enabled in (("without_cudnn", False), ("with_cudnn", True)):
        with _cudnn_attention(is_enabled):
            _attend(device, shape, LONGEST)  # handles and modules are loaded once, for any length
            first = [_timed_attention(device, shape, length) for length in lengths()]
            again = [_timed_attention(device, shape, length) for length in lengths()]
        figures[name] = {
            "first_seconds": first,
            "again_seconds": again,
            "sum_first": sum(first),
            "sum_again": sum(again),
        }
    return figures


def _timed_attention(device: torch.device, shape: Shape, length: int) -> float:
    """Return wall-clock seconds, since what cuDNN prepares is prepared on the host."""
    start = time.perf_counter()
    _attend(device, shape, length)
    return time.perf_counter() - start


def _attend(device: torch.device, shape: Shape, length: int) -> None:
    query, key, value = (
        torch.randn(1, heads, length, shape.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    attended.sum().backward()  # type: ignore[no-untyped-call]
    _synchronize(device)
