"""Weights are quantized in pieces, to the bits that bitsandbytes gives for the whole."""

import pytest
import torch
from bitsandbytes import functional

from qlora_cli.quantization import blocks
from qlora_cli.quantization.blocks import FourBitFormat, quantize
from qlora_cli.quantization.counted_codes import bounds, counted_codes
from qlora_cli.quantization.methods import int8
from qlora_cli.quantization.methods.int8 import quantize_rows


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("num_pieces", [1, 3], ids=["at once", "in pieces"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (5, 70)], ids=str)
def test_4_bit_in_pieces_is_4_bit_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    dtype: torch.dtype,
    quant_type: str,
    double: bool,
    num_pieces: int,
) -> None:
    weight = random_weight(*shape, dtype=dtype)
    before = weight.clone()
    monkeypatch.setattr(blocks, "PIECE_SIZE", -(-weight.numel() // num_pieces // 64) * 64)
    packed, state = quantize([weight], weight.shape, FourBitFormat(quant_type=quant_type, double_quant=double))
    whole, expected = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double)
    assert torch.equal(packed, whole)
    actual, wanted = state.as_dict(packed=True), expected.as_dict(packed=True)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(actual[name], tensor), name
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_those_of_bitsandbytes_at_every_bound_and_in_blocks_of_any_size(dtype: torch.dtype) -> None:
    values = functional.get_4bit_type("nf4", device="cpu")
    between = (values[1:] + values[:-1]) / 2
    neighbours = [between, torch.nextafter(between, values[1:]), torch.nextafter(between, values[:-1])]
    block = torch.cat([*neighbours, values, torch.tensor([1.0, -0.0, 0.0])])  # the largest is 1: nothing is scaled
    scales = torch.tensor([0.0, 1e-45, 1e-39, 1e-38, 6e-8, 3e-3, 1.0, -1.0, 6e4, 3e38]).unsqueeze(1)
    weight = (scales * block).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    counted = bounds("nf4")
    assert counted is not None
    packed, absmax = counted_codes(weight, counted, 64)
    expected, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(packed, expected)
    assert packed.is_contiguous()
    assert torch.equal(absmax, state.absmax)


def test_a_weight_may_come_in_pieces_of_whole_blocks() -> None:
    weight = random_weight(8, 16, 64)
    packed, state = quantize(
        iter(torch.split(weight, 1)), weight.shape, FourBitFormat(quant_type="nf4", double_quant=True)
    )
    whole, expected = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, whole)
    assert torch.equal(state.absmax, expected.absmax)
    assert state.shape == weight.shape


@pytest.mark.parametrize("piece", [1, 130, 10**6], ids=["rows", "2 rows", "at once"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_in_pieces_of_rows_is_int8_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool, piece: int
) -> None:
    weight = random_weight(65, 33, dtype=dtype).T if transposed else random_weight(33, 65, dtype=dtype)
    monkeypatch.setattr(int8, "PIECE_SIZE", piece)
    codes, scales = quantize_rows(weight)
    expected, largest, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
    assert torch.equal(codes, expected)
    assert torch.equal(scales, largest)
    assert codes.is_contiguous()
