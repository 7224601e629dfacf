"""The memory that each kernel of attention allocates: with scores or without."""

import pytest
import torch

from qlora_cli.memory.tracing.functions import GpuFunctions
from qlora_cli.memory.tracing.kernels import Kernels
from qlora_cli.memory.tracing.sdpa import attend
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.settings.choices import SdpaBackend

A100 = (8, 0)
BATCH, HEADS, SEQ, WIDTH = 2, 4, 96, 16


def heads(
    num_heads: int = HEADS, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16, *, seq: int = SEQ
) -> torch.Tensor:
    """Return a projection, `(batch, heads, seq, width)`, on the meta device."""
    return torch.empty((BATCH, num_heads, seq, width), dtype=dtype, device="meta", requires_grad=True)


def run(
    backend: SdpaBackend,
    *,
    mask: torch.Tensor | None = None,
    kv_heads: int = HEADS,
    widths: tuple[int, int] = (WIDTH, WIDTH),
    seq: int = SEQ,
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Return the result of attention, and the bytes allocated in the forward and in the backward pass."""
    query, key, value = (
        heads(HEADS, widths[0], seq=seq),
        heads(kv_heads, widths[0], seq=seq),
        heads(kv_heads, widths[1], seq=seq),
    )
    trace = MemoryTrace(Kernels(A100))
    for tensor in (query, key, value, *(() if mask is None else (mask,))):
        trace.ignore(tensor)
    with trace:
        result = attend(
            backend,
            query,
            key,
            value,
            mask=mask,
            dropout=0.0,
            is_causal=mask is None,
            scale=None,
            enable_gqa=kv_heads != HEADS,
        )
        num_forward = len(trace.storages)
        torch.autograd.backward(result.sum())
    sizes = [storage.num_bytes for storage in trace.storages]
    return result, sizes[:num_forward], sizes[num_forward:]


@pytest.mark.parametrize("backend", [SdpaBackend.FLASH, SdpaBackend.EFFICIENT, SdpaBackend.MATH])
@pytest.mark.parametrize(("kv_heads", "widths"), [(4, (16, 16)), (2, (16, 16)), (4, (20, 20))])
def test_the_result_has_the_shape_of_the_query(backend: SdpaBackend, kv_heads: int, widths: tuple[int, int]) -> None:
    result, _, _ = run(backend, kv_heads=kv_heads, widths=widths)
    assert result.shape == (BATCH, HEADS, SEQ, widths[1])
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [SdpaBackend.EFFICIENT, SdpaBackend.MATH])
def test_the_result_has_the_width_of_the_values_if_it_differs(backend: SdpaBackend) -> None:
    result, _, _ = run(backend, widths=(32, 16))
    assert result.shape == (BATCH, HEADS, SEQ, 16)


@pytest.mark.parametrize("backend", [SdpaBackend.FLASH, SdpaBackend.EFFICIENT])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_and_efficient_kernels_allocate_no_scores(backend: SdpaBackend, kv_heads: int) -> None:
    sums = []
    for seq in (1024, 2048):
        _, forward, backward = run(backend, kv_heads=kv_heads, seq=seq)
        assert max(*forward, *backward) < BATCH * HEADS * seq * seq
        assert BATCH * HEADS * seq * WIDTH * 2 in forward
        sums.append(sum(size for size in (*forward, *backward) if size >= seq))
    assert sums[1] == 2 * sums[0]


def test_the_math_backend_allocates_scores_that_grow_with_the_square_of_the_length() -> None:
    for seq in (SEQ, 2 * SEQ):
        _, forward, backward = run(SdpaBackend.MATH, seq=seq)
        scores = BATCH * HEADS * seq * seq * 2
        # PyTorch's own composition computes in fp32: scores and probabilities, then a copy in 16 bit.
        assert [size for size in forward if size >= scores].count(2 * scores) >= 2
        assert 2 * scores in backward


def test_a_boolean_mask_is_converted_and_its_rows_are_padded_to_16() -> None:
    mask = torch.ones((BATCH, 1, 90, 90), dtype=torch.bool, device="meta")
    _, forward, _ = run(SdpaBackend.EFFICIENT, mask=mask, seq=90)
    converted, padded = BATCH * 90 * 90 * 2, BATCH * 90 * 96 * 2
    assert converted in forward
    assert padded in forward
    aligned = torch.ones((BATCH, 1, 96, 96), dtype=torch.bool, device="meta")
    _, forward, _ = run(SdpaBackend.EFFICIENT, mask=aligned)
    assert forward.count(BATCH * 96 * 96 * 2) == 1  # converted, and not padded
    numbers = torch.zeros((BATCH, 1, 96, 96), dtype=torch.bfloat16, device="meta")
    _, forward, _ = run(SdpaBackend.EFFICIENT, mask=numbers)
    assert BATCH * 96 * 96 * 2 not in forward  # used unchanged


def test_grouped_keys_and_values_are_repeated_except_by_flash() -> None:
    repeated = BATCH * HEADS * SEQ * WIDTH * 2
    assert run(SdpaBackend.EFFICIENT, kv_heads=2)[1].count(repeated) >= 3  # keys, values and the result
    assert run(SdpaBackend.FLASH, kv_heads=2)[1].count(repeated) == 1  # the result
    assert run(SdpaBackend.FLASH, kv_heads=2)[2].count(repeated) >= 3  # gradients of every head, in the backward pass


def test_widths_that_are_not_multiples_of_8_are_padded_by_flash() -> None:
    padded = BATCH * HEADS * SEQ * 24 * 2
    assert run(SdpaBackend.FLASH, widths=(20, 20))[1].count(padded) == 4  # queries, keys, values, and the result
    assert run(SdpaBackend.FLASH, widths=(24, 24))[1].count(padded) == 1


def test_a_pinned_backend_is_used_whatever_the_gpu_would_choose() -> None:
    for pinned, expected in ((SdpaBackend.AUTO, SdpaBackend.FLASH), (SdpaBackend.MATH, SdpaBackend.MATH)):
        functions = GpuFunctions(A100, backend=pinned)
        with functions:
            torch.nn.functional.scaled_dot_product_attention(heads(), heads(), heads(), is_causal=True)
        assert functions.backends == {expected}
