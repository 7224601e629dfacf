"""Quantize a weight to 4 bit piece by piece: to the same bits as bitsandbytes, in bounded memory.

On a CPU `bitsandbytes.functional.quantize_4bit` holds several fp32 copies of a tensor, and it needs the whole tensor.
Blocks are independent of one another, so a weight can be quantized in pieces of whole blocks; only double
quantization, that of the constants, needs all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState

from qlora_cli.model_files.finite import is_finite, not_finite
from qlora_cli.quantization.counted_codes import bounds, counted_codes

BLOCK_SIZE = 64  # weights that share a constant
NESTED_BLOCK_SIZE = 256  # constants that share a constant of their own
PIECE_SIZE = 1024**2  # weights quantized at a time; a multiple of the block


@dataclass(frozen=True, kw_only=True)
class FourBitFormat:
    """The format of a weight in 4 bit."""

    quant_type: str  # nf4 or fp4
    double_quant: bool
    storage: torch.dtype = torch.uint8


@dataclass
class SquaredError:
    """Sums of squares over a weight: of its quantization error, and of the weight itself."""

    error: float = 0.0
    weight: float = 0.0

    def add(self, weight: torch.Tensor, restored: torch.Tensor) -> None:
        """Add a part of the weight, and what it is dequantized to."""
        exact = weight.float()
        self.error += float((restored.float() - exact).square().sum())
        self.weight += float(exact.square().sum())

    @property
    def relative_rms(self) -> float:
        """The root mean square of the error over that of the weight; 0 for a weight of zeros."""
        return (self.error / self.weight) ** 0.5 if self.weight else 0.0


def quantize(
    pieces: Iterable[torch.Tensor], shape: torch.Size, how: FourBitFormat, error: SquaredError | None = None
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a weight given in pieces; return its packed codes, `(num_bytes / storage size, 1)`, and its state.

    `pieces` are on one device, in one dtype, and together hold the elements of `shape` in order; each but the last
    consists of whole blocks. The quantization error is added to `error`, unless that is None.

    Raises:
        ModelError: a piece holds NaN or infinite values.
    """
    num_weights = prod(shape)
    packed = absmax = None
    done = 0
    for whole in pieces:
        for piece in _split(whole.reshape(-1)):
            if not is_finite(piece):
                raise not_finite("holds ", piece.dtype)
            codes, state = _quantized(piece, how.quant_type)
            if packed is None or absmax is None:
                code, dtype = state.code, piece.dtype
                packed, absmax = _allocate(num_weights, codes, state)
            assert done % BLOCK_SIZE == 0, "a piece before the last ended within a block"
            if codes.numel() != packed.numel():
                packed[done // 2 : done // 2 + codes.numel()] = codes.view(-1)
                absmax[done // BLOCK_SIZE : done // BLOCK_SIZE + state.absmax.numel()] = state.absmax
            done += piece.numel()
            if error is not None:
                error.add(piece, functional.dequantize_4bit(codes, state))
    assert packed is not None, "a weight without a piece"
    assert absmax is not None, "a weight without a piece"
    assert done == num_weights, f"pieces of {done} weights for a shape of {num_weights}"
    state = QuantState(
        absmax=absmax, shape=shape, dtype=dtype, blocksize=BLOCK_SIZE, code=code, quant_type=how.quant_type
    )
    return packed.view(how.storage).unsqueeze(1), nest(state) if how.double_quant else state


def _quantized(piece: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, QuantState]:
    """Return the packed codes of a piece, and its state, with single quantization."""
    between = bounds(quant_type)
    if piece.device.type != "cpu" or between is None or piece.numel() % BLOCK_SIZE:
        quantized: tuple[torch.Tensor, QuantState] = functional.quantize_4bit(
            piece, blocksize=BLOCK_SIZE, quant_type=quant_type
        )
        return quantized
    codes, absmax = counted_codes(piece, between, BLOCK_SIZE)
    state = QuantState(
        absmax=absmax,
        shape=piece.shape,
        dtype=piece.dtype,
        blocksize=BLOCK_SIZE,
        code=functional.get_4bit_type(quant_type, device="cpu"),
        quant_type=quant_type,
    )
    return codes, state


def _allocate(num_weights: int, codes: torch.Tensor, state: QuantState) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate codes and constants of a weight; if its first piece is the whole weight, return those of the piece."""
    if codes.numel() == -(-num_weights // 2):
        return codes.view(-1), state.absmax
    packed = torch.empty(-(-num_weights // 2), dtype=torch.uint8, device=codes.device)
    return packed, torch.empty(-(-num_weights // BLOCK_SIZE), dtype=torch.float32, device=codes.device)


def _split(flat: torch.Tensor) -> Iterable[torch.Tensor]:
    # On a GPU the tensor is there as a whole, and the kernel needs no further memory.
    return torch.split(flat, PIECE_SIZE) if flat.device.type == "cpu" else (flat,)


def nest(state: QuantState) -> QuantState:
    """Quantize the constants of `state` to 8 bits (double quantization)."""
    state.offset = state.absmax.mean()
    state.absmax, state.state2 = functional.quantize_blockwise(
        state.absmax.sub_(state.offset),  # in place: on a GPU, the 16-bit weight is still in memory
        blocksize=NESTED_BLOCK_SIZE,
    )
    state.nested = True
    return state
