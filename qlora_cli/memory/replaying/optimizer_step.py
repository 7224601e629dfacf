"""The allocations of an optimizer step: the state, created in the first step, and the temporaries of every step.

Bytes follow from the shapes of the trained parameters. The order follows `step()` of each optimizer in torch,
bitsandbytes or transformers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from qlora_cli.memory.tracing.passes import Passes, Recorder
from qlora_cli.settings.choices import Optimizer

OPTIMIZER = "optimizer"
FIRST, LATER = "step 1", "step"
FLOAT_BYTES = 4
# bitsandbytes/optim/optimizer.py: smaller parameters have an fp32 state, and smaller states are not paged.
MIN_8BIT_SIZE, MIN_PAGED_SIZE = 4096, 100_000
BLOCK = 256  # values of an 8-bit state that share a constant
MAP_BYTES = 256 * 4  # the table of levels, one for each 8-bit state


@dataclass(frozen=True, kw_only=True)
class OptimizerSteps:
    """Passes `FIRST` and `LATER`; the state is permanent. `paged_bytes` of it are in unified memory."""

    passes: Passes
    paged_bytes: int

    @property
    def state_bytes(self) -> int:
        """The size of the state, whether in unified memory or not."""
        permanent = (self.passes.storages[number] for number in self.passes.permanent)
        return self.paged_bytes + sum(storage.num_bytes for storage in permanent)


def is_lora_b(name: str) -> bool:
    """Return whether this is the B matrix of a linear layer, which LoRA+ gives a multiple of the learning rate.

    The B of an embedding does not count: there PEFT initializes B at random and A with zeros.
    """
    return ".lora_B." in name


def parameter_groups(model: nn.Module, trained: Sequence[nn.Parameter], *, loraplus: bool) -> list[list[nn.Parameter]]:
    """Return the parameters `trained` of `model` in the groups that the optimizer steps through one by one."""
    if not loraplus:
        return [list(trained)]
    faster = {id(parameter) for name, parameter in model.named_parameters() if is_lora_b(name)}
    return [[parameter for parameter in trained if (id(parameter) in faster) == is_b] for is_b in (False, True)]


def embedding_ids(model: nn.Module) -> set[int]:
    """Return the `id` of each embedding weight, whose state is in fp32 even in the 8-bit optimizers."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def optimizer_steps(
    optimizer: Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    *,
    clips: bool = True,
    decays: bool = False,
    embeddings: Collection[int] = (),
) -> OptimizerSteps:
    """Return the allocations of the first and of a later step for parameters with the shapes of `groups`.

    `clips`: gradients are clipped first; `decays`: there is weight decay; `embeddings`: see `embedding_ids`.
    """
    passes = Passes()
    paged_bytes = 0
    for name in (FIRST, LATER):
        recorder = Recorder(passes, name, OPTIMIZER)
        norm = _clip(recorder, sum(len(group) for group in groups)) if clips else None
        paged_bytes += _step(recorder, optimizer, groups, embeddings, is_first=name == FIRST, decays=decays)
        if norm is not None:
            recorder.free(norm)
    passes.find_permanent()
    return OptimizerSteps(passes=passes, paged_bytes=paged_bytes)


def _step(
    recorder: Recorder,
    optimizer: Optimizer,
    groups: Sequence[Sequence[nn.Parameter]],
    embeddings: Collection[int],
    *,
    is_first: bool,
    decays: bool,
) -> int:
    """Record a step after clipping; return the bytes of paged state that it allocates."""
    trained = [parameter for group in groups for parameter in group]
    if optimizer == Optimizer.ADAFACTOR:
        _adafactor(recorder, trained, is_first=is_first)
        return 0
    if optimizer == Optimizer.SGD:
        for group in groups if decays else ():
            _foreach(recorder, group)  # the gradients with the decay added (`_multi_tensor_sgd`)
        return 0
    if optimizer == Optimizer.ADAMW_TORCH:
        for group in groups:
            if is_first:
                _states(recorder, optimizer, group, embeddings)
            _foreach(recorder, group)  # the roots of the second moments (`_multi_tensor_adam`)
        return 0
    return _states(recorder, optimizer, trained, embeddings) if is_first else 0


def _states(
    recorder: Recorder, optimizer: Optimizer, trained: Sequence[nn.Parameter], embeddings: Collection[int]
) -> int:
    """Record the states of all parameters; return the number of paged bytes."""
    paged_bytes, has_levels = 0, False
    for parameter in trained:
        in_8_bit = is_8bit(optimizer, parameter) and id(parameter) not in embeddings
        if in_8_bit and not has_levels:
            for _ in range(_num_moments(optimizer)):
                recorder.allocate(MAP_BYTES)
            has_levels = True
        paged_bytes += _state(recorder, optimizer, parameter, in_8_bit=in_8_bit)
    return paged_bytes


def is_8bit(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Return whether the state of a parameter, which is not an embedding, is in 8 bit."""
    return optimizer.is_8bit and parameter.numel() >= MIN_8BIT_SIZE


def _num_moments(optimizer: Optimizer) -> int:
    return 1 if optimizer.is_lion else 2


def _state(recorder: Recorder, optimizer: Optimizer, parameter: nn.Parameter, *, in_8_bit: bool) -> int:
    """Record the state of one parameter; return the number of paged bytes."""
    size = parameter.numel() * parameter.element_size()
    if optimizer == Optimizer.ADAMW_TORCH_FUSED:
        recorder.allocate(FLOAT_BYTES)  # the step counter, which other optimizers have on the host
    if optimizer in {Optimizer.ADAMW_TORCH, Optimizer.ADAMW_TORCH_FUSED}:
        recorder.allocate(size)
        recorder.allocate(size)
        return 0
    size = parameter.numel() * (1 if in_8_bit else FLOAT_BYTES)
    paged = optimizer.is_paged and parameter.numel() >= MIN_PAGED_SIZE
    moments = range(_num_moments(optimizer))
    if not paged:
        for _ in moments:
            recorder.allocate(size)
    if in_8_bit:
        for _ in moments:
            recorder.allocate(-(-parameter.numel() // BLOCK) * FLOAT_BYTES)
    return len(moments) * size if paged else 0


def _clip(recorder: Recorder, count: int) -> int:
    """Record `clip_grad_norm_`: the norm of each gradient, the tensor of all norms, and the total that scales them.

    Returns the storage of the total norm, which the trainer holds until it has reported the step.
    """
    norms = [recorder.allocate(FLOAT_BYTES) for _ in range(count)]
    stacked = recorder.allocate(count * FLOAT_BYTES)
    total = recorder.allocate(FLOAT_BYTES)
    recorder.free(stacked, *reversed(norms))
    sum_, reciprocal, coefficient = (recorder.allocate(FLOAT_BYTES) for _ in range(3))
    recorder.free(reciprocal, sum_)
    clamped = recorder.allocate(FLOAT_BYTES)
    recorder.free(coefficient, clamped)
    return total


def _foreach(recorder: Recorder, trained: Sequence[nn.Parameter]) -> None:
    """Record one temporary for each parameter, all alive at once, as `torch._foreach_` operations allocate them."""
    temporaries = [recorder.allocate(parameter.numel() * parameter.element_size()) for parameter in trained]
    recorder.free(*reversed(temporaries))


def _adafactor(recorder: Recorder, trained: Sequence[nn.Parameter], *, is_first: bool) -> None:
    """Record a step of `transformers.optimization.Adafactor`, without a first moment, scaling or relative steps.

    The update of a parameter lives until that of the next one is allocated.
    """
    update: int | None = None
    for parameter in trained:
        size = parameter.numel() * parameter.element_size()
        factors = _factors(parameter)
        if is_first:
            for state in factors[:2] or (size,):
                recorder.allocate(state)
        norm, rms = recorder.allocate(FLOAT_BYTES), recorder.allocate(FLOAT_BYTES)
        # The optimizer's state holds the root mean square of the weight; in later steps, this one replaces it.
        recorder.free(norm) if is_first else recorder.free(norm, rms)
        squares, before = recorder.allocate(size), update
        update = recorder.allocate(size)
        recorder.free(squares, *([] if before is None else [before]))
        update = _factored(recorder, update, factors, size) if factors else _rooted(recorder, update, size)
        norm, mean = recorder.allocate(FLOAT_BYTES), recorder.allocate(FLOAT_BYTES)
        recorder.free(norm)
        threshold = recorder.allocate(FLOAT_BYTES)
        recorder.free(mean, threshold)
        recorder.free(recorder.allocate(size))  # the update, negated
    if update is not None:
        recorder.free(update)


def _factors(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the bytes of the second moment's factors, by rows and by columns, and of the rows' mean.

    Empty for a vector, whose second moment is not factored.
    """
    if parameter.dim() < 2:
        return ()
    *outer, rows, columns = parameter.shape
    mean = prod(outer) * parameter.element_size()
    return mean * rows, mean * columns, mean


def _factored(recorder: Recorder, squares: int, factors: tuple[int, ...], size: int) -> int:
    """Record the update from two factors (`_approx_sq_grad`); return it."""
    rows, columns, mean = factors
    for num_bytes in (rows, columns):
        recorder.free(recorder.allocate(num_bytes))
    mean_of_rows = recorder.allocate(mean)
    row = recorder.allocate(rows)
    recorder.free(mean_of_rows)
    column, update = recorder.allocate(columns), recorder.allocate(size)
    recorder.free(row, column, squares)
    return update


def _rooted(recorder: Recorder, squares: int, size: int) -> int:
    """Record the update of a vector; return it."""
    update = recorder.allocate(size)
    recorder.free(squares)
    return update
