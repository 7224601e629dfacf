"""The memory of an optimizer step, compared with the real optimizers event by event, or state by state."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from qlora_cli.memory.replaying.optimizer_step import (
    FIRST,
    LATER,
    MAP_BYTES,
    embedding_ids,
    optimizer_steps,
    parameter_groups,
)
from qlora_cli.memory.tracing.kernels import Kernels
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.settings.choices import Optimizer

SHAPES = ((8, 64), (64, 8), (8, 130), (300, 8), (16, 256), (256, 16), (17, 300))
# Around the sizes where bitsandbytes changes storage: 8 bit from 4096 numbers, paged from 100,000.
AT_THE_LIMITS = ((1, 4095), (1, 4096), (1, 4097), (1, 99_999), (1, 100_000), (8, 12_501))

EventSizes = list[tuple[int, int]]  # (number by order of allocation, bytes); a release has a negative size


def parameters(shapes: Sequence[tuple[int, ...]], device: str = "meta") -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def event_sizes(events: Sequence[int], sizes: Sequence[int]) -> EventSizes:
    """Return the same events with storages numbered in the order of allocation."""
    numbers: dict[int, int] = {}
    numbered = []
    for event in events:
        if event >= 0:
            numbers[event] = len(numbers)
            numbered.append((numbers[event], sizes[event]))
        else:
            numbered.append((numbers[~event], -sizes[~event]))
    return numbered


def predicted(
    optimizer: Optimizer, trained: Sequence[nn.Parameter], name: str, *, clips: bool, decays: bool = False
) -> EventSizes:
    passes = optimizer_steps(optimizer, [trained], clips=clips, decays=decays).passes
    return event_sizes(passes.events[name], [storage.num_bytes for storage in passes.storages])


@pytest.fixture
def _foreach_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip with lists of tensors, as on a GPU."""
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_device_has_foreach_support", lambda _: True)


def recorded(optimizer: torch.optim.Optimizer, *, clips: bool) -> list[EventSizes]:
    """Return the memory events of two steps of an optimizer that works on lists."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trace = traced(optimizer, clipped=trained if clips else ())
    sizes = [storage.num_bytes for storage in trace.storages]
    return [event_sizes(segment.events, sizes) for segment in trace.segments[1:]]


def traced(optimizer: torch.optim.Optimizer, clipped: Sequence[nn.Parameter] = ()) -> MemoryTrace:
    trace = MemoryTrace(Kernels((8, 0)))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            trace.ignore(parameter)
            assert parameter.grad is not None
            trace.ignore(parameter.grad)
    with trace:
        for step in (FIRST, LATER):
            trace.mark(step)
            norm = torch.nn.utils.clip_grad_norm_(clipped, 1.0, foreach=True) if clipped else None
            optimizer.step()
            del norm
    assert trace.segments[0].events == []
    return trace


@pytest.mark.usefixtures("_foreach_on_meta")
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], AT_THE_LIMITS])
def test_allocations_of_adamw_equal_the_real_ones_event_by_event(
    shapes: tuple[tuple[int, ...], ...], clips: bool
) -> None:
    trained = parameters(shapes)
    steps = [predicted(Optimizer.ADAMW_TORCH, trained, name, clips=clips) for name in (FIRST, LATER)]
    assert steps == recorded(torch.optim.AdamW(trained, foreach=True), clips=clips)
    assert any(size < 0 for _, size in steps[1])


@pytest.mark.usefixtures("_foreach_on_meta")
def test_with_lora_plus_adamw_updates_two_groups_one_after_another() -> None:
    slow, fast = parameters(SHAPES[:3]), parameters(SHAPES[3:])
    groups: list[dict[str, Any]] = [{"params": slow}, {"params": fast, "lr": 1.0}]
    passes = optimizer_steps(Optimizer.ADAMW_TORCH, [slow, fast], clips=True).passes
    sizes = [storage.num_bytes for storage in passes.storages]
    steps = [event_sizes(passes.events[name], sizes) for name in (FIRST, LATER)]
    assert steps == recorded(torch.optim.AdamW(groups, foreach=True), clips=True)
    assert steps[1] != predicted(Optimizer.ADAMW_TORCH, [*slow, *fast], LATER, clips=True)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shapes", [SHAPES, AT_THE_LIMITS])
def test_allocations_of_sgd_equal_the_real_ones_event_by_event(
    shapes: tuple[tuple[int, ...], ...], decay: float
) -> None:
    trained = parameters(shapes)
    steps = [predicted(Optimizer.SGD, trained, name, clips=False, decays=decay > 0) for name in (FIRST, LATER)]
    assert steps == recorded(torch.optim.SGD(trained, lr=0.1, weight_decay=decay, foreach=True), clips=False)
    assert bool(steps[1]) == (decay > 0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], ((40,), (8, 64), (50,)), ((3, 8, 16), (4,))])
def test_allocations_of_adafactor_equal_the_real_ones_event_by_event(
    shapes: tuple[tuple[int, ...], ...], decay: float
) -> None:
    trained = parameters(shapes)
    # As transformers makes it: `trainer_optimizer.py`, `_get_adafactor`.
    real = Adafactor(trained, lr=0.1, weight_decay=decay, scale_parameter=False, relative_step=False)
    trace = traced(real)
    sizes = [storage.num_bytes for storage in trace.storages]
    first, later = (segment.events for segment in trace.segments[1:])
    assert predicted(Optimizer.ADAFACTOR, trained, FIRST, clips=False) == event_sizes(first, sizes)
    # In a later step the allocation replaces that of the step before, which is released then.
    in_order = [sizes[event] if event >= 0 else -sizes[~event] for event in later]
    assert [size for _, size in predicted(Optimizer.ADAFACTOR, trained, LATER, clips=False)] == in_order


def test_only_the_first_step_leaves_memory_allocated_for_the_state() -> None:
    trained = parameters(SHAPES)
    for optimizer in Optimizer:
        assert sum(size for _, size in predicted(optimizer, trained, LATER, clips=True)) == 0
    left = sum(size for _, size in predicted(Optimizer.ADAMW_TORCH, trained, FIRST, clips=True))
    assert left == 2 * sum(parameter.numel() * 4 for parameter in trained)


def state_sizes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[int]:
    """Return the bytes of a parameter's state in the order in which it was made, without the shared levels."""
    return [
        value.nbytes
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")
    ]


EIGHT_BIT = [
    (Optimizer.ADAMW_8BIT, bitsandbytes.optim.AdamW8bit, 2),
    (Optimizer.LION_8BIT, bitsandbytes.optim.Lion8bit, 1),
]


@pytest.mark.parametrize("shape", AT_THE_LIMITS)
@pytest.mark.parametrize(("optimizer", "real_class", "num_moments"), EIGHT_BIT)
def test_8_bit_states_equal_those_of_bitsandbytes(
    shape: tuple[int, ...], optimizer: Optimizer, real_class: Any, num_moments: int
) -> None:
    (parameter,) = trained = parameters([shape], "cpu")
    real = real_class(trained)
    real.init_state(real.param_groups[0], parameter, 0, 0)
    levels = [value.nbytes for name, value in real.state[parameter].items() if name.startswith("qmap")]
    assert levels == ([MAP_BYTES] * num_moments if parameter.numel() >= 4096 else [])
    allocated = [size for _, size in predicted(optimizer, trained, FIRST, clips=False)]
    assert allocated == [*levels, *state_sizes(real, parameter)]
    assert real.state[parameter]["state1"].element_size() == (1 if parameter.numel() >= 4096 else 4)


@pytest.mark.parametrize(("optimizer", "_", "num_moments"), EIGHT_BIT)
def test_the_levels_of_8_bit_states_are_allocated_once_with_the_first_8_bit_state(
    optimizer: Optimizer, _: Any, num_moments: int
) -> None:
    trained = parameters([(8, 8), (64, 128), (64, 128)])
    allocated = [size for _, size in predicted(optimizer, trained, FIRST, clips=False)]
    own = [8192] * num_moments + [8192 // 256 * 4] * num_moments
    assert allocated == [256] * num_moments + [MAP_BYTES] * num_moments + own + own


@pytest.mark.parametrize("shape", AT_THE_LIMITS)
def test_the_state_of_lion_in_32_bit_is_one_moment(shape: tuple[int, ...]) -> None:
    (parameter,) = trained = parameters([shape], "cpu")
    real = bitsandbytes.optim.Lion32bit(trained)
    real.init_state(real.param_groups[0], parameter, 0, 0)
    allocated = [size for _, size in predicted(Optimizer.LION_32BIT, trained, FIRST, clips=False)]
    assert allocated == state_sizes(real, parameter) == [parameter.numel() * 4]


@pytest.mark.parametrize("shape", AT_THE_LIMITS)
@pytest.mark.parametrize(
    ("optimizer", "real_class"),
    [
        (Optimizer.PAGED_ADAMW_8BIT, bitsandbytes.optim.PagedAdamW8bit),
        (Optimizer.PAGED_ADAMW_32BIT, bitsandbytes.optim.PagedAdamW32bit),
        (Optimizer.PAGED_LION_8BIT, bitsandbytes.optim.PagedLion8bit),
        (Optimizer.PAGED_LION_32BIT, bitsandbytes.optim.PagedLion32bit),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_of_100_000_numbers_or_more_are_paged_outside_of_the_pool(
    shape: tuple[int, ...], optimizer: Optimizer, real_class: Any
) -> None:
    """On a CPU bitsandbytes pages nothing, so its rule says what a GPU would page: not if `numel() < 1e5`."""
    (parameter,) = trained = parameters([shape], "cpu")
    real = real_class(trained)
    real.init_state(real.param_groups[0], parameter, 0, 0)
    state = real.state[parameter]
    steps = optimizer_steps(optimizer, [trained], clips=False)
    is_paged = parameter.numel() >= 1e5
    moments = [state[name].nbytes for name in ("state1", "state2") if name in state]
    assert len(moments) == (1 if optimizer.is_lion else 2)
    assert steps.paged_bytes == (sum(moments) if is_paged else 0)
    levels = MAP_BYTES * sum(name.startswith("qmap") for name in state)
    assert steps.state_bytes == sum(state_sizes(real, parameter)) + levels


def test_the_state_of_an_embedding_is_in_fp32_in_8_bit_optimizers() -> None:
    """transformers registers this with the manager of bitsandbytes (`Trainer.create_optimizer`), as this test does."""
    embedding = nn.Embedding(128, 64)
    (weight,) = embedding.parameters()
    weight.grad = torch.zeros_like(weight)
    real = bitsandbytes.optim.AdamW8bit([weight])
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    try:
        real.step()
    finally:
        manager.initialize()  # it is shared by the whole process
    steps = optimizer_steps(Optimizer.ADAMW_8BIT, [[weight]], clips=False, embeddings=embedding_ids(embedding))
    sizes = [steps.passes.storages[event].num_bytes for event in steps.passes.events[FIRST]]
    assert sizes == state_sizes(real, weight) == [weight.numel() * 4] * 2


def test_lora_plus_has_a_group_for_the_b_matrices_of_all_layers() -> None:
    model = nn.ModuleDict(
        {
            "lora_A": nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(4, 8, bias=False)}),
        }
    )
    model = nn.ModuleDict({"q_proj": model})
    a, b = model.parameters()
    trained = [a, b, a, b]  # one layer represents two
    assert [[id(one) for one in group] for group in parameter_groups(model, trained, loraplus=True)] == [
        [id(a)] * 2,
        [id(b)] * 2,
    ]
    assert parameter_groups(model, trained, loraplus=False) == [trained]


def test_fused_adamw_has_no_temporaries_and_its_counters_are_on_the_device() -> None:
    trained = parameters(SHAPES)
    events = predicted(Optimizer.ADAMW_TORCH_FUSED, trained, FIRST, clips=False)
    assert [size for _, size in events] == [
        size for parameter in trained for size in (4, parameter.numel() * 4, parameter.numel() * 4)
    ]
    assert predicted(Optimizer.ADAMW_TORCH_FUSED, trained, LATER, clips=False) == []
    real = torch.optim.AdamW(parameters(SHAPES, "cpu"), fused=True)
    real.step()
    assert [[value.nbytes for value in state.values()] for state in real.state.values()] == [
        [4, parameter.numel() * 4, parameter.numel() * 4] for parameter in trained
    ]


def test_more_trained_parameters_take_more_state_in_every_optimizer() -> None:
    for optimizer in Optimizer:
        totals = []
        for width in (64, 4096, 65536):
            totals.append(optimizer_steps(optimizer, [parameters([(8, width)])], clips=True).state_bytes)
        if optimizer == Optimizer.SGD:
            assert totals == [0, 0, 0]  # it has no state
        else:
            assert all(less < more for less, more in pairwise(totals)), optimizer
