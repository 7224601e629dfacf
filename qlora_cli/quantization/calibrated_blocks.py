"""Quantize a weight to 4 bit so that its layer computes nearly the same, in the format of bitsandbytes.

bitsandbytes scales each block of weights by its largest one and rounds each weight to the nearest level. What counts
is the error of the layer's outputs, which the second moments of its inputs tell: here a block gets the scale with the
least weighted error, and what a weight loses by rounding is made up for by those that are rounded after it, as in GPTQ
(arXiv 2210.17323), with the levels of NF4 or FP4 in place of even ones. Scales are chosen first, and quantized if they
are to be, so that codes are chosen for the scales that are stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from bitsandbytes import functional
from bitsandbytes.functional import QuantState

from qlora_cli.quantization.blocks import BLOCK_SIZE, FourBitFormat, nest

# Scales that are tried for a block, as shares of its largest weight.
SHARES = tuple(0.6 + 0.03 * index for index in range(16))
TABLE_SIZE = 4097  # values from -1 to 1, zero among them
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # shares of the mean of the diagonal that are added to it
# Blocks whose scales are searched at a time, with a few copies of them in fp32: 4 million weights keep a GPU busy.
PIECE_BLOCKS = 65_536
CPU_PIECE_BLOCKS = 4096  # with their copies they fit into its caches
AT_ONCE = 32 * 1024**2  # weights of several experts whose codes are chosen together


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """Sums over the tokens that a weight was multiplied with.

    Attributes:
        matrix: The products of their features, `(in, in)` in fp32.
        num_tokens: Their number.
    """

    matrix: torch.Tensor
    num_tokens: int

    @cached_property
    def inverse_factor(self) -> torch.Tensor:
        """The upper Cholesky factor of the inverse of the matrix, which is damped until it has one."""
        upper = self.matrix
        for lower in self._lower_factors():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                break
        return upper

    def root(self) -> torch.Tensor:
        """Return a lower triangular L with L Lᵀ the damped matrix, or its diagonal without correlations."""
        if self.has_correlations:
            return next(self._lower_factors(), self._diagonal_root())
        return self._diagonal_root()

    def _diagonal_root(self) -> torch.Tensor:
        return (self.matrix.diagonal() + DAMPINGS[0] * self._mean()).sqrt().diag()

    def _lower_factors(self) -> Iterator[torch.Tensor]:
        """Yield the lower Cholesky factor of the matrix, damped more and more, where there is one."""
        for damping in DAMPINGS:
            damped = self.matrix.clone()
            damped.diagonal().add_(damping * self._mean())
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                yield lower

    def _mean(self) -> torch.Tensor:
        return self.matrix.diagonal().mean().clamp_min(torch.finfo(self.matrix.dtype).tiny)

    @property
    def has_correlations(self) -> bool:
        """Whether there are enough tokens to tell how features go together, and not only how large they are."""
        return self.num_tokens >= len(self.matrix)


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """A weight, or one of those that are stacked in a tensor.

    Attributes:
        values: `(out, in)`, or `(in, out)` if it is transposed, as it is stored.
        moments: Those of its inputs, on the same device; None if it had none, for bitsandbytes' own codes.
    """

    values: torch.Tensor
    moments: InputMoments | None
    is_transposed: bool = False


def calibrate(slices: Sequence[WeightSlice], shape: torch.Size, how: FourBitFormat) -> tuple[torch.Tensor, QuantState]:
    """Quantize a weight of `shape`, given in slices of whole blocks; return what `blocks.quantize` returns."""
    first = slices[0].values
    weights = [_Weighted(part) for part in slices]
    levels, order = _levels(how.quant_type, first.device)
    state = QuantState(
        absmax=torch.cat([weight.scales(levels) for weight in weights]),
        shape=shape,
        dtype=first.dtype,
        blocksize=BLOCK_SIZE,
        code=functional.get_4bit_type(how.quant_type, device=first.device),
        quant_type=how.quant_type,
    )
    state = nest(state) if how.double_quant else state
    parts = torch.split(restored_scales(state), [weight.num_blocks for weight in weights])
    indices = [part for group in _groups(weights, parts) for part in _chosen(group, levels)]
    return _pack(order[torch.cat(indices).int()]).view(how.storage).unsqueeze(1), state


class _Weighted:
    """A slice, with how much an error in each of its input features counts, `importance`, `(in,)`.

    That is how large the feature is; with feedback, what later weights can't make up for.
    """

    def __init__(self, part: WeightSlice) -> None:
        self._part = part
        moments = part.moments
        has_feedback = moments is not None and moments.has_correlations
        self._factor = moments.inverse_factor if moments is not None and has_feedback else None
        if self._factor is not None:
            self._importance = self._factor.diagonal().square().reciprocal()
        elif moments is not None:
            self._importance = moments.matrix.diagonal()

    @property
    def num_blocks(self) -> int:
        return -(-self._part.values.numel() // BLOCK_SIZE)

    def scales(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the scale of each block."""
        blocks = _blocks(self._part.values.reshape(-1))
        if self._part.moments is None:
            return blocks.float().abs().amax(1)
        shape = self._part.values.shape
        column = self._importance[:, None] if self._part.is_transposed else self._importance
        importance = _blocks(column.expand(shape).reshape(-1))
        size = CPU_PIECE_BLOCKS if blocks.is_cpu else PIECE_BLOCKS
        pieces = zip(torch.split(blocks, size), torch.split(importance, size), strict=True)
        return torch.cat([_best_scales(piece.float(), important, levels) for piece, important in pieces])

    def matrix(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight, `(out, in)` in fp32, and next to each value the scale of its block."""
        values = self._part.values.float()
        wide = scales.repeat_interleave(BLOCK_SIZE)[: values.numel()].view(values.shape)
        return (values.T, wide.T) if self._part.is_transposed else (values, wide)

    def flat(self, indices: torch.Tensor) -> torch.Tensor:
        """Return what was chosen for the `matrix`, `(out, in)`, in the order in which the weight is stored."""
        return (indices.T if self._part.is_transposed else indices).reshape(-1)

    @property
    def factor(self) -> torch.Tensor | None:
        """The factor by which errors are distributed; None if they are not."""
        return self._factor

    def goes_with(self, other: "_Weighted") -> bool:
        """Return whether the codes of both can be chosen at once."""
        one, two = self._part, other._part
        is_same = one.values.shape == two.values.shape and one.is_transposed == two.is_transposed
        return is_same and self._factor is not None and other._factor is not None


def _groups(
    weights: Sequence[_Weighted], scales: Sequence[torch.Tensor]
) -> Iterator[list[tuple[_Weighted, torch.Tensor]]]:
    """Yield the weights, those that follow one another and can be worked on at once together, with their scales."""
    group: list[tuple[_Weighted, torch.Tensor]] = []
    for weight, own in zip(weights, scales, strict=True):
        num_weights = (len(group) + 1) * weight.num_blocks * BLOCK_SIZE
        if group and not (weight.goes_with(group[0][0]) and num_weights <= AT_ONCE):
            yield group
            group = []
        group.append((weight, own))
    yield group


def _chosen(group: Sequence[tuple[_Weighted, torch.Tensor]], levels: torch.Tensor) -> list[torch.Tensor]:
    """Return the indices of the levels of each weight, flat, for the scales of its blocks."""
    values, scales = (torch.stack(list(of)) for of in zip(*(one.matrix(own) for one, own in group), strict=True))
    factors = [one.factor for one, _ in group if one.factor is not None]
    if not factors:
        indices = _nearest(values, scales, levels)
    else:
        together = torch.stack(factors) if len(factors) > 1 else factors[0][None]  # a copy may be large
        indices = _with_feedback(values, scales, together, levels)
    return [one.flat(chosen) for (one, _), chosen in zip(group, indices, strict=True)]


def restored_scales(state: QuantState) -> torch.Tensor:
    """Return the scales of the blocks, `(blocks,)` in fp32, as every pass computes them."""
    scales: torch.Tensor = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def _levels(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels in ascending order, and the code of each."""
    levels, order = functional.get_4bit_type(quant_type, device=device).sort()
    return levels, order.to(torch.uint8)


def _best_scales(blocks: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    largest = blocks.abs().amax(1, keepdim=True)
    shares = blocks / torch.where(largest == 0, 1, largest)
    table = _table(levels)
    best = torch.full_like(largest, torch.inf)
    chosen = torch.ones_like(largest)
    for share in SHARES:
        error = _looked_up(shares / share, table).mul_(share).sub_(shares).square_().mul_(importance)
        total = error.sum(1, keepdim=True)
        chosen, best = torch.where(total < best, share, chosen), torch.minimum(total, best)
    return (chosen * largest).view(-1)


def _table(levels: torch.Tensor) -> torch.Tensor:
    """Return the nearest level to each of many values from -1 to 1, in order: looking up is faster than searching."""
    middles = torch.linspace(-1, 1, TABLE_SIZE, device=levels.device)
    return levels[_nearest(middles, torch.ones_like(middles), levels)]


def _looked_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    last = (len(table) - 1) / 2
    numbers = values.mul_(last).add_(last + 0.5).clamp_(0, 2 * last).to(torch.int32)
    return table.index_select(0, numbers.view(-1)).view(values.shape)


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """Return `flat` as blocks, `(blocks, 64)`; the last one is filled up with zeros."""
    missing = -len(flat) % BLOCK_SIZE
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK_SIZE)


def _nearest(values: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the level nearest to each value; with a scale of zero any level is as near."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values / torch.where(scales == 0, 1, scales), middles)


def _with_feedback(
    values: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """Return the indices of the levels, column by column, each error distributed over the columns that follow.

    `values` and `scales` are `(weights, out, in)`, and changed; `factors` `(weights, in, in)`.
    """
    indices = torch.empty_like(values, dtype=torch.uint8)
    for start in range(0, values.shape[2], BLOCK_SIZE):
        block = slice(start, min(start + BLOCK_SIZE, values.shape[2]))
        # Column by column, each of which lies together here.
        columns, column_scales = (whole[..., block].permute(2, 0, 1).contiguous() for whole in (values, scales))
        own = factors[:, block, block].permute(1, 2, 0)[..., None].contiguous()  # (column, later column, weight, 1)
        errors, nearest = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.uint8)
        for number, (exact, scale) in enumerate(zip(columns, column_scales, strict=True)):
            chosen = _nearest(exact, scale, levels)
            nearest[number] = chosen
            torch.div(exact - scale * levels[chosen], own[number, number], out=errors[number])
            columns[number + 1 :].addcmul_(own[number, number + 1 :], errors[number], value=-1)
        indices[..., block] = nearest.permute(1, 2, 0)
        values[..., block.stop :].baddbmm_(errors.permute(1, 2, 0), factors[:, block, block.stop :], alpha=-1)
    return indices


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Return two codes per byte, the first in the upper half."""
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[::2] << 4) | codes[1::2]
