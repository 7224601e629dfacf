"""How long a calibration takes on a device, by its operations and a roofline of what the device sustains.

Of a quantized weight `(out, in)` on T tokens these are two products, the moments of its input and their factors, which
weights with the same input share, the search for scales, and the feedback from each column to those that follow.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.gpus import find_gpu, this_cpu
from qlora_cli.quantization.blocks import BLOCK_SIZE
from qlora_cli.quantization.calibrated_blocks import AT_ONCE, SHARES
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.timing.operation import Operation, OperationKind, Pass
from qlora_cli.timing.rates import Rates
from qlora_cli.timing.rates_file import KnownRates
from qlora_cli.timing.roofline import cost_of

FLOAT_BYTES = 4
# Of fp32 products, by a Cholesky factor and an inverse from it, which are triangular and partly sequential: a guess.
FACTOR_SHARE = 0.25
SEARCH_PASSES = 9  # over all weights, in fp32, to try a share of the largest weight as the scale
COLUMN_KERNELS = 12  # to choose the codes of a column, and distribute its error within its block


@dataclass(frozen=True, kw_only=True)
class CalibratedShape:
    """Matrices `(out, in)` of one weight, `count` of them if experts are stacked.

    Attributes:
        owns_moments: False if another weight has the same input.
        tokens_share: Of all tokens, by each of the matrices.
    """

    num_rows: int
    num_columns: int
    count: int = 1
    owns_moments: bool = True
    tokens_share: float = 1.0


def calibrated_shapes(shapes: PreTrainedModel, layout: StoragePlan) -> Iterator[CalibratedShape]:
    """Yield the weights of `shapes`, on the meta device, whose codes are chosen where it is stored as `layout` says.

    Weights of one module with inputs of one width are taken to share it, as queries, keys and values do.
    """
    config = shapes.config.get_text_config()
    seen: set[tuple[str, int]] = set()
    for name in (entry.name for entry in layout.inventory.entries if entry.is_quantized):
        shape = shapes.get_parameter(name).shape
        count = shape[0] if len(shape) == 3 else 1
        owner = (name.rpartition(".")[0].rpartition(".")[0], shape[-1])
        yield CalibratedShape(
            num_rows=shape[-2],
            num_columns=shape[-1],
            count=count,
            owns_moments=count > 1 or owner not in seen,
            tokens_share=min(1.0, (getattr(config, "num_experts_per_tok", None) or count) / count),
        )
        seen.add(owner)


def calibration_seconds(weights: Iterable[CalibratedShape], num_tokens: int, rates: Rates) -> float:
    """Return how long the codes of `weights` take to choose on `num_tokens`; reading weights is not counted."""
    return sum(cost_of(list(_operations(weight, num_tokens)), rates).seconds for weight in weights)


def rates_of_device(device: torch.device) -> KnownRates | None:
    """Return what a device of this machine sustains: measured, or by its data sheet; None if neither is known."""
    if device.type == "cpu":
        return rates_on(this_cpu())
    with torch.cuda.device(device):
        return rates_on(find_gpu("auto"))


def _operations(weight: CalibratedShape, num_tokens: int) -> Iterator[tuple[int, Operation]]:
    rows, columns, count = weight.num_rows, weight.num_columns, weight.count
    tokens = round(num_tokens * weight.tokens_share)
    yield 2 * count, _operation("product", flops=2 * rows * columns * tokens, is_fp32=False)
    if weight.owns_moments:  # of 16-bit values, by tensor cores
        yield count, _operation("moments", flops=2 * columns**2 * tokens, is_fp32=False)
        factors = round(4 / 3 * columns**3 / FACTOR_SHARE)
        yield count, _operation("factors", flops=factors)
    searched = SEARCH_PASSES * 2 * FLOAT_BYTES * rows * columns
    yield count * len(SHARES), _operation("scales", num_bytes=searched, kernels=SEARCH_PASSES)
    together = max(1, min(count, AT_ONCE // (rows * columns)))
    turns, height = -(-count // together), together * rows
    yield turns * columns * COLUMN_KERNELS, _operation("column", num_bytes=2 * FLOAT_BYTES * height)
    within = 2 * FLOAT_BYTES * height * BLOCK_SIZE // 2
    yield turns * columns, _operation("column", num_bytes=within, kernels=0)
    yield count, _operation("feedback", flops=rows * columns**2)


def _operation(
    operator: str, *, flops: int = 0, num_bytes: int = 0, kernels: int = 1, is_fp32: bool = True
) -> Operation:
    return Operation(
        run_in=Pass.FORWARD,
        kind=OperationKind.OTHER,
        operator=operator,
        flops=flops,
        num_bytes=num_bytes,
        kernels=kernels,
        is_fp32=is_fp32,
    )
