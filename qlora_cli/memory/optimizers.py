"""What a step of the optimizer takes: its state, made in the first step, and its temporaries, in every one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qlora_cli.memory.passes import Passes, Recorder
from qlora_cli.settings.models import Optimizer

OPTIMIZER = "optimizer"
FIRST, LATER = "step 1", "step"
EIGHT_BIT = (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)
FLOAT_BYTES = 4
# bitsandbytes/optim/optimizer.py: smaller parameters keep an fp32 state, and smaller states are not paged.
LEAST_8BIT_SIZE, LEAST_PAGED_SIZE = 4096, 100_000
BLOCK = 256  # states that share a constant, in the 8-bit optimizers
MAP_BYTES = 256 * 4  # the levels of 8-bit states, one table for each of the two


@dataclass(frozen=True, kw_only=True)
class OptimizerSteps:
    """Passes `FIRST` and `LATER`; the state is permanent. `paged_bytes` of it are in unified memory."""

    passes: Passes
    paged_bytes: int


def optimizer_steps(optimizer: Optimizer, trained: Sequence[nn.Parameter], *, clips: bool) -> OptimizerSteps:
    """Return what the first and a later step take for parameters like `trained`; `clips`: gradients are, before."""
    passes = Passes()
    paged_bytes = 0
    for name in (FIRST, LATER):
        recorder = Recorder(passes, name, OPTIMIZER)
        norm = _clip(recorder, len(trained)) if clips else None
        if name == FIRST:
            paged_bytes = _states(recorder, optimizer, trained)
        if optimizer == Optimizer.ADAMW_TORCH:
            _root(recorder, trained)
        if norm is not None:
            recorder.died(norm)
    passes.find_permanent()
    return OptimizerSteps(passes=passes, paged_bytes=paged_bytes)


def _states(recorder: Recorder, optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> int:
    """Record the states of all parameters; return the bytes of them that are paged."""
    paged_bytes, has_levels = 0, False
    for parameter in trained:
        if is_8bit(optimizer, parameter) and not has_levels:
            recorder.born(MAP_BYTES)
            recorder.born(MAP_BYTES)
            has_levels = True
        paged_bytes += _state(recorder, optimizer, parameter)
    return paged_bytes


def is_8bit(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the state of a parameter is kept in 8 bit."""
    return optimizer in EIGHT_BIT and parameter.numel() >= LEAST_8BIT_SIZE


def _state(recorder: Recorder, optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Record the state of one parameter; return the bytes of it that are paged."""
    size = parameter.numel() * parameter.element_size()
    if optimizer == Optimizer.ADAMW_TORCH_FUSED:
        recorder.born(FLOAT_BYTES)  # the step counter; that of the others is on the host
    if optimizer in {Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED}:
        recorder.born(size)
        recorder.born(size)
        return 0
    in_8_bit = is_8bit(optimizer, parameter)
    size = parameter.numel() * (1 if in_8_bit else FLOAT_BYTES)
    paged = optimizer.is_paged and parameter.numel() >= LEAST_PAGED_SIZE
    if not paged:
        recorder.born(size)
        recorder.born(size)
    if in_8_bit:
        constants = -(-parameter.numel() // BLOCK) * FLOAT_BYTES
        recorder.born(constants)
        recorder.born(constants)
    return 2 * size if paged else 0


def _clip(recorder: Recorder, count: int) -> int:
    """Record `clip_grad_norm_`: the norm of each gradient, those in a row, and of them all, by which all are scaled.

    Returns the last, which the trainer keeps until it has told of the step.
    """
    norms = [recorder.born(FLOAT_BYTES) for _ in range(count)]
    row = recorder.born(count * FLOAT_BYTES)
    total = recorder.born(FLOAT_BYTES)
    recorder.died(row, *reversed(norms))
    sum_, reciprocal, coefficient = (recorder.born(FLOAT_BYTES) for _ in range(3))
    recorder.died(reciprocal, sum_)
    clamped = recorder.born(FLOAT_BYTES)
    recorder.died(coefficient, clamped)
    return total


def _root(recorder: Recorder, trained: Sequence[nn.Parameter]) -> None:
    """Record what AdamW by lists takes (`_multi_tensor_adam`): the roots of all second moments at once."""
    roots = [recorder.born(parameter.numel() * parameter.element_size()) for parameter in trained]
    recorder.died(*reversed(roots))
