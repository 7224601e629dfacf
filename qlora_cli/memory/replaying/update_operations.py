"""The operations of an optimizer's step, with the clipping of the gradients before it, for a prediction of time."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from qlora_cli.memory.replaying.optimizer_step import is_8bit
from qlora_cli.settings.choices import Optimizer
from qlora_cli.timing.operation import Counted, Operation, OperationKind, Pass

FLOAT_BYTES = 4
# aten/src/ATen/native/cuda/MultiTensorApply.cuh: 320 chunks of 65,536 values a launch, of at most 110 tensors.
VALUES_PER_LAUNCH, TENSORS_PER_LAUNCH = 65_536 * 320, 110
CLIPPING = (1, 2)  # values that its two operations move for each parameter: the norm, and the product with a factor


# The values of fp32 that each operation of a step moves for each parameter: of those that go over all tensors at once,
# `_multi_tensor_adam`: lerp, mul, addcmul, sqrt, div, add, addcdiv, and the decay of the weight.
OVER_ALL = {
    Optimizer.ADAMW_TORCH: (3, 2, 3, 2, 2, 2, 4, 2),
    Optimizer.ADAMW_TORCH_FUSED: (7,),
    Optimizer.SGD: (3,),
}
# `transformers.optimization.Adafactor`: squares, their two means, the factors' product, the update, its norm, the sum.
ADAFACTOR = (2, 1, 1, 2, 2, 2, 1, 2, 3)


def update_operations(optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> Counted:
    """Return the operations of a step of the `trained` parameters, each with how often it runs."""
    num_values = sum(parameter.numel() for parameter in trained)
    launches = max(-(-len(trained) // TENSORS_PER_LAUNCH), -(-num_values // VALUES_PER_LAUNCH))
    operations = Counter(_operation("clip_grad_norm_", moved * num_values, launches) for moved in CLIPPING)
    if optimizer in OVER_ALL:
        operations.update(_operation(optimizer, moved * num_values, launches) for moved in OVER_ALL[optimizer])
    else:
        operations.update(
            _operation(optimizer, moved * parameter.numel(), 1)
            for parameter in trained
            for moved in (ADAFACTOR if optimizer == Optimizer.ADAFACTOR else _of_bitsandbytes(optimizer, parameter))
        )
    return tuple((times, operation) for operation, times in operations.items())


def _of_bitsandbytes(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[float, ...]:
    """Return what one kernel moves: weight and state are read and written, and the gradient is read."""
    state = (1 if optimizer.is_lion else 2) * (1 / FLOAT_BYTES if is_8bit(optimizer, parameter) else 1)
    return (3 + 2 * state,)


def _operation(name: str, num_values: float, kernels: int) -> Operation:
    return Operation(Pass.UPDATE, OperationKind.OPTIMIZER, str(name), 0, round(FLOAT_BYTES * num_values), kernels)
