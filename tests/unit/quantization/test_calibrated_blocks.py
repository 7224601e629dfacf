"""Codes chosen by the inputs of a weight: in bitsandbytes' format, with less error of what the weight computes."""

import itertools

import pytest
import torch
from bitsandbytes import functional

from qlora_cli.quantization.blocks import FourBitFormat, quantize
from qlora_cli.quantization.calibrated_blocks import InputMoments, WeightSlice, calibrate

FORMATS = [
    FourBitFormat(quant_type=kind, double_quant=double)
    for kind, double in itertools.product(("nf4", "fp4"), (True, False))
]
SHAPES = [(96, 128), (40, 192), (24, 100), (7, 65)]  # rows of whole blocks, and others
NF4 = FORMATS[0]


def drawn(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(width: int, num_tokens: int = 2000, seed: int = 1) -> torch.Tensor:
    """Return inputs, `(tokens, width)`, whose features go together and differ in size, as those of real layers."""
    mixed = drawn((num_tokens, width), seed) @ (torch.eye(width) + 0.1 * drawn((width, width), seed + 1))
    return mixed * drawn((width,), seed + 2).exp()


def moments_of(inputs: torch.Tensor) -> InputMoments:
    return InputMoments(matrix=inputs.T @ inputs, num_tokens=len(inputs))


def restored(weight: torch.Tensor, how: FourBitFormat, moments: InputMoments | None) -> torch.Tensor:
    codes, state = calibrate([WeightSlice(values=weight, moments=moments)], weight.shape, how)
    made: torch.Tensor = functional.dequantize_4bit(codes, state)
    return made


def nearest(weight: torch.Tensor, how: FourBitFormat) -> torch.Tensor:
    made: torch.Tensor = functional.dequantize_4bit(*quantize([weight], weight.shape, how))
    return made


def output_error(inputs: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    return float((inputs @ (weight - other).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", FORMATS, ids=lambda how: f"{how.quant_type}-{how.double_quant}")
def test_the_error_of_the_outputs_is_smaller(how: FourBitFormat, shape: tuple[int, int]) -> None:
    weight, inputs = drawn(shape), inputs_of(shape[1])
    chosen = output_error(inputs, weight, restored(weight, how, moments_of(inputs)))
    assert chosen < 0.8 * output_error(inputs, weight, nearest(weight, how))


def described(value: object) -> object:
    """Return a value of a state, and only shape and dtype of one that depends on the weights."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return float if isinstance(value, float) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_state_have_the_layout_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = drawn((96, 128)).to(dtype)
    for how in FORMATS:
        codes, state = calibrate([WeightSlice(values=weight, moments=moments_of(inputs_of(128)))], weight.shape, how)
        expected_codes, expected = quantize([weight], weight.shape, how)
        assert (codes.shape, codes.dtype) == (expected_codes.shape, expected_codes.dtype)
        ours, theirs = state.as_dict(), expected.as_dict()
        assert {key: described(value) for key, value in ours.items()} == {
            key: described(value) for key, value in theirs.items()
        }
        assert functional.dequantize_4bit(codes, state).dtype == dtype


@pytest.mark.parametrize("how", FORMATS, ids=lambda how: f"{how.quant_type}-{how.double_quant}")
def test_without_inputs_each_weight_gets_the_nearest_level(how: FourBitFormat) -> None:
    """Nearest with the scale that is stored, which double quantization rounds; without it, that of bitsandbytes."""
    for shape in SHAPES:
        weight = drawn(shape)
        ours, theirs = restored(weight, how, None), nearest(weight, how)
        assert how.double_quant or torch.equal(ours, theirs)
        assert ((ours - weight).abs() <= (theirs - weight).abs() + 1e-7).all()


def test_inputs_of_another_layer_are_worse_than_none() -> None:
    weight, own, other = drawn((96, 128)), inputs_of(128), inputs_of(128, seed=50)
    errors = [output_error(own, weight, restored(weight, NF4, moments_of(inputs))) for inputs in (own, other)]
    assert errors[0] < output_error(own, weight, nearest(weight, NF4)) < errors[1]


def test_with_few_tokens_the_scales_alone_are_chosen() -> None:
    weight, inputs = drawn((96, 128)), inputs_of(128, num_tokens=127)
    made = restored(weight, NF4, moments_of(inputs))
    diagonal = InputMoments(matrix=torch.diag(inputs.square().sum(0)), num_tokens=127)
    assert torch.equal(made, restored(weight, NF4, diagonal))
    seen = inputs_of(128)
    assert output_error(seen, weight, made) < output_error(seen, weight, nearest(weight, NF4))


def test_stacked_weights_are_chosen_each_by_its_own_inputs() -> None:
    """And transposed ones, whose rows are features of the input, too."""
    how = FourBitFormat(quant_type="nf4", double_quant=True)
    for is_transposed in (False, True):
        stacked = drawn((3, 64, 128))
        seen = [inputs_of(64 if is_transposed else 128, seed=10 * number) for number in range(3)]
        moments = [moments_of(seen[0]), None, moments_of(seen[2])]
        slices = [
            WeightSlice(values=one, moments=of, is_transposed=is_transposed)
            for one, of in zip(stacked, moments, strict=True)
        ]
        made = functional.dequantize_4bit(*calibrate(slices, stacked.shape, how))
        plain = nearest(stacked, how)
        for number, (weight, inputs) in enumerate(zip(stacked, seen, strict=True)):
            exact, ours, theirs = ((one.T if is_transposed else one) for one in (weight, made[number], plain[number]))
            error, least = output_error(inputs, exact, ours), output_error(inputs, exact, theirs)
            if moments[number] is None:
                assert error == pytest.approx(least, rel=0.01)
            else:  # a block of a transposed weight is of one feature, whose size tells nothing about its scale
                assert error < (0.9 if is_transposed else 0.8) * least


def test_degenerate_weights_and_inputs_give_finite_weights() -> None:
    inputs = inputs_of(128)
    silent = inputs.clone()
    silent[:, :70] = 0  # features that are never there
    copied = inputs[:, :1].expand(-1, 128)  # features that are all the same
    zeros = drawn((32, 128))
    zeros[:8] = 0
    zeros[9, :64] = 0
    for weight, seen in itertools.product(
        (drawn((32, 128)), zeros, torch.zeros(32, 128)), (inputs, silent, copied, 0 * inputs)
    ):
        for how in FORMATS:
            made = restored(weight, how, moments_of(seen))
            assert made.isfinite().all()
            assert (made - weight).norm() <= 0.5 * weight.norm() + 1e-6


def test_the_codes_are_the_same_each_time() -> None:
    weight, moments = drawn((96, 128)), moments_of(inputs_of(128))
    assert torch.equal(restored(weight, NF4, moments), restored(weight, NF4, moments))
