"""Weights quantized as in training and restored: bit-identical to bitsandbytes, whole and in slices."""

import pytest
import torch
from bitsandbytes import functional

from qlora_cli.quantization.blocks import PIECE_SIZE, FourBitFormat
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.round_trip import quantized
from qlora_cli.settings.choices import Quantization
from qlora_cli.settings.models import QuantizationSettings

ODD_SHAPES = [(5, 96), (3, 40), (7, 1), (1, 1), (2, 3, 40)]  # rows, or the whole weight, end within a block
SHAPES = [(6, 64), (4, 192), (3, 8, 64)]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def how(quant_type: str = "nf4", *, double: bool = True) -> FourBitFormat:
    return FourBitFormat(quant_type=quant_type, double_quant=double)


def by_hand(weight: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Return the nearest of 16 levels times the largest magnitude in each block of 64, without double quantization."""
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
def test_a_round_trip_equals_that_of_bitsandbytes(
    shape: tuple[int, ...], double: bool, quant_type: str, dtype: torch.dtype
) -> None:
    weight = weight_of(shape, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double)
    restored = quantized([weight], weight.shape, how(quant_type, double=double)).dequantized()
    assert restored.dtype == dtype
    assert torch.equal(restored, functional.dequantize_4bit(packed, state).view(shape))
    assert not torch.equal(restored, weight)


@pytest.mark.parametrize("shape", [*SHAPES, *ODD_SHAPES])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_round_trip_is_correct_where_rows_end_within_a_block(shape: tuple[int, ...], quant_type: str) -> None:
    """Bitsandbytes' own kernel for CPUs with AVX-512 is wrong in this case: it takes the constants of other blocks."""
    weight = weight_of(shape)
    restored = quantized([weight], weight.shape, how(quant_type, double=False)).dequantized()
    torch.testing.assert_close(restored, by_hand(weight, quant_type), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 64), (5, 4, 32), (2, 3, 40), (4, 1, 96)])
@pytest.mark.parametrize("double", [True, False])
def test_the_round_trip_of_a_slice_equals_the_slice_of_the_whole(shape: tuple[int, ...], double: bool) -> None:
    weight = weight_of(shape, torch.bfloat16)
    stack = quantized([weight], weight.shape, how(double=double))
    for index in range(shape[0]):
        assert torch.equal(stack.slice(index), stack.dequantized()[index : index + 1])


def test_a_weight_in_many_pieces_equals_one_in_a_single_piece() -> None:
    weight = weight_of((3, PIECE_SIZE // 2 + 64), torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(quantized([weight], weight.shape, how()).dequantized(), expected)
    assert torch.equal(quantized(list(weight[:, None]), weight.shape, how()).dequantized(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_a_scale_for_each_row(dtype: torch.dtype) -> None:
    weight = weight_of((6, 40), dtype)
    restored = method_of(Quantization.INT8).round_trip(weight, QuantizationSettings(method=Quantization.INT8))
    half = weight.half().float()  # bitsandbytes quantizes from fp16
    largest = half.abs().amax(1, keepdim=True)
    expected = (half * 127 / largest).round() * largest / 127
    assert restored.dtype == dtype
    torch.testing.assert_close(restored, expected.to(dtype), rtol=1e-2, atol=1e-6)
    assert ((restored - expected.to(dtype)).abs() <= largest / 127 / 8).all()
