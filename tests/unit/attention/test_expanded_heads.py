"""Keys and values that heads share are expanded where PyTorch would store all scores, with the same result."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_cli.attention.expanded_heads import expanded_sdpa

BATCH, HEADS, WIDTH = 2, 6, 16


class Layer(nn.Module):
    """What attention of transformers reads of its layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


class RecordHeads(TorchFunctionMode):
    """Records the number of heads of queries and of keys in each call of PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[tuple[int, int]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            self.heads.append((args[0].shape[1], args[1].shape[1]))
        return function(*args, **(kwargs or {}))


def inputs(
    groups: int, num_queries: int, num_keys: int, widths: tuple[int, int], *, has_mask: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(0)
    sizes = [(HEADS, num_queries, widths[0]), (HEADS // groups, num_keys, widths[0])]
    sizes.append((HEADS // groups, num_keys, widths[1]))
    tensors = [torch.randn(BATCH, *size, requires_grad=True) for size in sizes]
    mask = torch.ones(BATCH, 1, num_queries, num_keys, dtype=torch.bool).tril() if has_mask else None
    return tensors, mask


def results_of(function: Any, layer: Layer, tensors: list[torch.Tensor], mask: torch.Tensor | None) -> Any:
    result = function(layer, *tensors, mask, scaling=0.3, dropout=0.0)[0]
    return [result, *torch.autograd.grad(result.square().sum(), tensors)]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 33), (7, 7), (64, 64), (97, 97)])
@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (2 * WIDTH, WIDTH)])
def test_results_and_gradients_are_those_of_sdpa(
    groups: int, has_mask: bool, num_queries: int, num_keys: int, widths: tuple[int, int]
) -> None:
    tensors, mask = inputs(groups, num_queries, num_keys, widths, has_mask=has_mask)
    expected = results_of(sdpa_attention_forward, Layer(groups), tensors, mask)
    for ours, theirs in zip(results_of(expanded_sdpa, Layer(groups), tensors, mask), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_mask", [False, True])
def test_no_kernel_gets_fewer_keys_than_queries(has_mask: bool) -> None:
    (query, key, value), mask = inputs(2, 40, 40, (WIDTH, WIDTH), has_mask=has_mask)
    with RecordHeads() as recorded:
        expanded_sdpa(Layer(2), query, key, value, mask)
    assert recorded.heads == [(HEADS, HEADS)]
    if not has_mask:
        with RecordHeads() as recorded:
            sdpa_attention_forward(Layer(2), query, key, value, mask)
        assert recorded.heads == [(HEADS, HEADS // 2)]
