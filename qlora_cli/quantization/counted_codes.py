"""Find the codes of a weight on a CPU: the bits of bitsandbytes' own kernel, in a third of its time.

Its kernel searches the bounds between the codes for each weight by itself (`torch.bucketize`). To compare all weights
with one bound after the other takes more comparisons, but the processor makes many at a time.
"""

from functools import cache

import torch
from bitsandbytes import functional

SMALLEST = 1e-38  # a divisor, as in bitsandbytes: a block of zeros stays one


@cache
def bounds(quant_type: str) -> tuple[float, ...] | None:
    """Return the values halfway between neighbouring codes, rounded to fp32; None if the codes do not ascend."""
    values = functional.get_4bit_type(quant_type, device="cpu")
    return tuple(((values[:-1] + values[1:]) / 2).tolist()) if bool((values.diff() > 0).all()) else None


def counted_codes(
    piece: torch.Tensor, bounds: tuple[float, ...], block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed codes, `(num_weights / 2, 1)` in uint8, and the largest magnitude of each block in fp32.

    `piece` consists of whole blocks, of any shape and floating dtype, on a CPU.
    """
    blocks = piece.reshape(-1, block_size).float()
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).view(-1)
    codes = torch.zeros(scaled.shape, dtype=torch.uint8)
    is_above = torch.empty(scaled.shape, dtype=torch.bool)
    for bound in bounds:
        torch.gt(scaled, bound, out=is_above)
        codes += is_above.view(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax
