"""4-bit weights as training sees them: quantized as `train` does on loading, dequantized as in every pass.

The bits are those of bitsandbytes on the whole tensor, but in bounded memory, and one by one for stacked experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState

from qlora_cli.quantization.blocks import BLOCK_SIZE, PIECE_SIZE, FourBitFormat, quantize


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A weight of `shape` in 4 bit: packed codes, and an fp32 constant for each block."""

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    quant_type: str
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, packed: torch.Tensor, state: QuantState) -> "Quantized":
        """Return a weight from bitsandbytes' codes and state, with its constants dequantized."""
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return cls(
            packed=packed.contiguous().view(torch.uint8).view(-1),
            absmax=absmax.float(),
            code=state.code,
            quant_type=state.quant_type,
            dtype=state.dtype,
            shape=state.shape,
        )

    def dequantized(self) -> torch.Tensor:
        """Return the dequantized weight."""
        return self._between(0, self.shape.numel()).view(self.shape)

    def slice(self, index: int) -> torch.Tensor:
        """Return the slice `(1, …)` along the first dimension, dequantized."""
        size = self.shape[1:].numel()
        if size % BLOCK_SIZE:  # a block spans two slices
            return self.dequantized()[index : index + 1]
        return self._between(index * size, (index + 1) * size).view(1, *self.shape[1:])

    def _between(self, start: int, stop: int) -> torch.Tensor:
        """Return the weights from `start`, where a block begins, to `stop`, flat."""
        weights = torch.empty(stop - start, dtype=self.dtype)
        for begin in range(start, stop, PIECE_SIZE):
            end = min(begin + PIECE_SIZE, stop)
            state = QuantState(
                absmax=self.absmax[begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)],
                shape=torch.Size((end - begin,)),
                dtype=self.dtype,
                blocksize=BLOCK_SIZE,
                code=self.code,
                quant_type=self.quant_type,
            )
            codes = self.packed[begin // 2 : -(-end // 2)].unsqueeze(1)
            weights[begin - start : end - start] = functional.dequantize_4bit(codes, state).view(-1)
        return weights


def quantized(pieces: Iterable[torch.Tensor], shape: torch.Size, how: FourBitFormat) -> Quantized:
    """Quantize a weight to 4 bit as `train` stores it, given in pieces of whole blocks."""
    return Quantized.of(*quantize(pieces, shape, how))
