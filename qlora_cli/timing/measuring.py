"""Measure what a device sustains, with the shapes of a decoder layer.

Each rate is that of a few calls as a training step makes them, with new results, repeated after some that are not
counted. Of a GPU the median counts. On a CPU other programs take turns with us, and only ever make a call slower: its
clock is the time in which this thread has a core, and the lower quartile counts.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F  # noqa: N812 - its conventional name
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.timing.rates import KERNEL_SECONDS, Rates

BLOCK_SIZE, RANK = 64, 16
NUM_WARM_UP, LEAST_SAMPLES = 1, 3
SAMPLE_SECONDS = 5e-3  # of repeated calls, so that neither the clock nor a launch counts
NUM_CHAINED = 200
# What modules, adapters and nodes of autograd take of the host for an operation, as a multiple of a chained one: 44
# and 7.7 µs, in a decoder whose layers have 64 values, on one core.
PYTHON_SHARE = 5.7
COPIED_BYTES = 64 * 1024**2
ATTENTION_PRODUCTS = 2 + 5  # forward and backward

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """The sizes of what is measured: two rows of `length` tokens, and those of a decoder layer."""

    length: int
    hidden: int
    intermediate: int
    num_heads: int

    @property
    def num_tokens(self) -> int:
        """The tokens of a micro-batch."""
        return 2 * self.length


# A layer of the model of `benchmarks/cpu_step.py`, and one of Llama-3.1-8B, which fills all SMs of a GPU.
OF_CPU = DecoderSizes(length=256, hidden=768, intermediate=2048, num_heads=12)
OF_GPU = DecoderSizes(length=2048, hidden=4096, intermediate=14_336, num_heads=32)


def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = 10.0,
) -> Rates:
    """Return what `device` sustains with products in `dtype`, measured for about `seconds`."""
    one = DeviceMeasurement(device, dtype, seconds=seconds / 8)
    is_host = device.type == "cpu"
    flops, element_wise = one.products(dtype), one.element_wise()
    return Rates(
        flops=flops,
        attention_flops=one.attention(),
        fp32_flops=flops if dtype == torch.float32 else one.products(torch.float32),
        num_bytes=element_wise,
        dequantized_bytes=one.dequantization(),
        narrow_bytes=one.narrow_products(),
        host_copy_bytes=element_wise if is_host else one.host_copies(),
        kernel_seconds=0.0 if is_host else KERNEL_SECONDS,
        dispatch_seconds=one.dispatch(),
        num_sms=1 if is_host else torch.cuda.get_device_properties(device).multi_processor_count,
        watts=0,
        is_host=is_host,
    )


class DeviceMeasurement:
    """Measures one device: each rate for about `seconds`, with tensors in `dtype` where none is named."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, seconds: float) -> None:
        self._device = device
        self._dtype = dtype
        self._seconds = seconds
        self._sizes = OF_CPU if device.type == "cpu" else OF_GPU

    def products(self, dtype: torch.dtype) -> float:
        """Return the FLOPs a second of `(tokens, hidden)` by `(hidden, intermediate)`, and back, in `dtype`."""
        sizes = self._sizes
        narrow = self._random(sizes.num_tokens, sizes.hidden, dtype=dtype)
        wide = self._random(sizes.num_tokens, sizes.intermediate, dtype=dtype)
        weight = self._random(sizes.intermediate, sizes.hidden, dtype=dtype)
        seconds = self._time([lambda: narrow @ weight.T, lambda: wide @ weight])
        return 4 * sizes.num_tokens * sizes.hidden * sizes.intermediate / seconds

    def attention(self) -> float:
        """Return the FLOPs a second of attention, forward and backward.

        On a GPU it is causal, and the half that is masked is not counted. On a CPU it has a mask, as of rows of
        different lengths, and computes all scores.
        """
        sizes, is_host = self._sizes, self._device.type == "cpu"
        shape = (2, sizes.num_heads, sizes.length, sizes.hidden // sizes.num_heads)
        query, key, value = (self._random(*shape).requires_grad_() for _ in range(3))
        upstream = self._random(*shape)
        mask = torch.ones(sizes.length, sizes.length, dtype=torch.bool).tril() if is_host else None

        def attend() -> None:
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not is_host)
            torch.autograd.grad(result, (query, key, value), upstream)

        flops = ATTENTION_PRODUCTS * 2 * query.numel() * sizes.length
        with without_cudnn_attention():  # as training does
            return flops * (1.0 if is_host else 0.5) / self._time([attend])

    def element_wise(self) -> float:
        """Return the bytes a second, read and written, of what a decoder computes besides products."""
        sizes = self._sizes
        gate, up = (self._random(sizes.num_tokens, sizes.intermediate) for _ in range(2))
        return (2 + 3 + 3) * gate.nbytes / self._time([lambda: F.silu(gate), lambda: gate * up, lambda: gate + up])

    def dequantization(self) -> float:
        """Return the bytes a second, read and written, of the dequantization of an NF4 weight."""
        weight = self._random(self._sizes.intermediate, self._sizes.hidden)
        packed, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        num_bytes: int = packed.nbytes + state.absmax.nbytes + weight.nbytes
        return num_bytes / self._time([lambda: dequantize_4bit(packed, state)])

    def narrow_products(self) -> float:
        """Return the bytes a second, read and written, of the products of an adapter, forward and backward."""
        sizes = self._sizes
        rows, sums = (self._random(sizes.num_tokens, sizes.hidden) for _ in range(2))
        low, down = self._random(sizes.num_tokens, RANK), self._random(RANK, sizes.hidden)
        runs: list[Run] = [lambda: rows @ down.T, lambda: sums.addmm_(low, down), lambda: low.T @ rows]
        return (4 * rows.nbytes + 3 * low.nbytes + 3 * down.nbytes) / self._time(runs)

    def host_copies(self) -> float:
        """Return the bytes a second of copies from pinned host memory to a GPU."""
        pinned = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        return COPIED_BYTES / self._time([lambda: pinned.to(self._device, non_blocking=True)])

    def dispatch(self) -> float:
        """Return the seconds of the host for one operation of a model, from a chain of operations on one value."""
        start, factor = torch.ones(1, requires_grad=True), torch.ones(1)

        def chain() -> None:
            value = start
            for _ in range(NUM_CHAINED):
                value = value * factor + factor
            value.backward()  # type: ignore[no-untyped-call]

        num_operations = 3 * NUM_CHAINED  # two forward, one backward
        return PYTHON_SHARE * self._typical(chain, self._seconds, self._on_host) / num_operations

    def _time(self, runs: Sequence[Run]) -> float:
        """Return the seconds of all `runs`, one after the other."""
        sample = self._on_host if self._device.type == "cpu" else self._on_gpu
        return sum(self._typical(run, self._seconds / len(runs), sample) for run in runs)

    def _typical(self, run: Run, seconds: float, sample: Callable[[Run, int], float]) -> float:
        """Return the duration of `run`, over samples that take about `seconds` together."""
        sample(run, NUM_WARM_UP)
        repeats = max(1, ceil(SAMPLE_SECONDS / sample(run, 1)))
        end, samples = time.perf_counter() + seconds, list[float]()
        while len(samples) < LEAST_SAMPLES or time.perf_counter() < end:
            samples.append(sample(run, repeats) / repeats)
        quarters = statistics.quantiles(samples, n=4)
        return quarters[0] if sample == self._on_host else quarters[1]

    def _on_host(self, run: Run, repeats: int) -> float:
        start = time.thread_time()
        for _ in range(repeats):
            run()
        return time.thread_time() - start

    def _on_gpu(self, run: Run, repeats: int) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=dtype or self._dtype)
