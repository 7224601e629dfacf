"""Weights through the storage of training and back: the bits of bitsandbytes, of whole weights and of slices."""

import pytest
import torch
from bitsandbytes import functional

from qlora_cli.quantization.blocks import PIECE_SIZE, FourBitFormat
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.round_trip import quantized
from qlora_cli.settings.choices import Quantization
from qlora_cli.settings.models import QuantizationSettings

ODD_SHAPES = [(5, 96), (3, 40), (7, 1), (1, 1), (2, 3, 40)]  # of which rows or the whole do not end with a block
SHAPES = [(6, 64), (4, 192), (3, 8, 64)]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def how(quant_type: str = "nf4", *, double: bool = True) -> FourBitFormat:
    return FourBitFormat(quant_type=quant_type, double_quant=double)


def by_hand(weight: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Return the nearest of 16 levels times the largest magnitude of each 64 weights, without double quantization."""
    flat = weight.float().flatten()
    padded = torch.cat([flat, torch.zeros(-len(flat) % 64)]).view(-1, 64)
    largest = padded.abs().amax(1, keepdim=True)
    levels = functional.get_4bit_type(quant_type, device="cpu")
    nearest = (padded / largest.clamp_min(1e-30)).unsqueeze(2).sub(levels).abs().argmin(2)
    restored: torch.Tensor = (levels[nearest] * largest).flatten()[: len(flat)].view(weight.shape)
    return restored


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_bitsandbytes_makes_of_the_whole(
    shape: tuple[int, ...], double: bool, quant_type: str, dtype: torch.dtype
) -> None:
    weight = weight_of(shape, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double)
    found = quantized([weight], weight.shape, how(quant_type, double=double)).dequantized()
    assert found.dtype == dtype
    assert torch.equal(found, functional.dequantize_4bit(packed, state).view(shape))
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("shape", [*SHAPES, *ODD_SHAPES])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_is_right_also_where_a_row_does_not_end_with_a_block(shape: tuple[int, ...], quant_type: str) -> None:
    """Bitsandbytes' own kernel for CPUs with AVX-512 is not: it takes the constants of other blocks there."""
    weight = weight_of(shape)
    found = quantized([weight], weight.shape, how(quant_type, double=False)).dequantized()
    torch.testing.assert_close(found, by_hand(weight, quant_type), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 64), (5, 4, 32), (2, 3, 40), (4, 1, 96)])
@pytest.mark.parametrize("double", [True, False])
def test_a_slice_is_that_of_the_whole(shape: tuple[int, ...], double: bool) -> None:
    weight = weight_of(shape, torch.bfloat16)
    stack = quantized([weight], weight.shape, how(double=double))
    for index in range(shape[0]):
        assert torch.equal(stack.slice(index), stack.dequantized()[index : index + 1])


def test_a_weight_of_many_pieces_is_that_of_one() -> None:
    weight = weight_of((3, PIECE_SIZE // 2 + 64), torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(quantized([weight], weight.shape, how()).dequantized(), expected)
    assert torch.equal(quantized(list(weight[:, None]), weight.shape, how()).dequantized(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_a_scale_for_each_row(dtype: torch.dtype) -> None:
    weight = weight_of((6, 40), dtype)
    found = method_of(Quantization.INT8).round_trip(weight, QuantizationSettings(method=Quantization.INT8))
    half = weight.half().float()  # bitsandbytes quantizes from fp16
    largest = half.abs().amax(1, keepdim=True)
    expected = (half * 127 / largest).round() * largest / 127
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2, atol=1e-6)
    assert ((found - expected.to(dtype)).abs() <= largest / 127 / 8).all()
