"""What a step of the optimizer takes, against the real optimizers: event by event, or state by state."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch import nn

from qlora_cli.memory.kernels import Kernels
from qlora_cli.memory.optimizers import FIRST, LATER, MAP_BYTES, optimizer_steps
from qlora_cli.memory.trace import MemoryTrace
from qlora_cli.settings.models import Optimizer

SHAPES = ((8, 64), (64, 8), (8, 130), (300, 8), (16, 256), (256, 16), (17, 300))
# Around the sizes where bitsandbytes stores otherwise: 8 bit from 4096 numbers, paged from 100,000.
AT_THE_LIMITS = ((1, 4095), (1, 4096), (1, 4097), (1, 99_999), (1, 100_000), (8, 12_501))

Life = list[tuple[int, int]]  # (number by order of birth, bytes); a death has a negative size


def parameters(shapes: Sequence[tuple[int, ...]], device: str = "meta") -> list[nn.Parameter]:
    found = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
    for parameter in found:
        parameter.grad = torch.zeros_like(parameter)
    return found


def lives(events: Sequence[int], sizes: Sequence[int]) -> Life:
    """Return the same events with storages numbered as they are born."""
    numbers: dict[int, int] = {}
    found = []
    for event in events:
        if event >= 0:
            numbers[event] = len(numbers)
            found.append((numbers[event], sizes[event]))
        else:
            found.append((numbers[~event], -sizes[~event]))
    return found


def predicted(optimizer: Optimizer, trained: Sequence[nn.Parameter], name: str, *, clips: bool) -> Life:
    passes = optimizer_steps(optimizer, trained, clips=clips).passes
    return lives(passes.events[name], [storage.num_bytes for storage in passes.storages])


@pytest.fixture
def _foreach_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip by lists of tensors, as on a GPU."""
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_device_has_foreach_support", lambda _: True)


def recorded(trained: Sequence[nn.Parameter], *, clips: bool) -> list[Life]:
    """Return what two steps of AdamW by lists do to memory."""
    optimizer = torch.optim.AdamW(trained, foreach=True)
    trace = MemoryTrace(Kernels((8, 0)))
    for parameter in trained:
        trace.ignore(parameter)
        assert parameter.grad is not None
        trace.ignore(parameter.grad)
    with trace:
        for step in (FIRST, LATER):
            trace.mark(step)
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True) if clips else None
            optimizer.step()
            del norm
    sizes = [storage.num_bytes for storage in trace.storages]
    assert trace.segments[0].events == []
    return [lives(segment.events, sizes) for segment in trace.segments[1:]]


@pytest.mark.usefixtures("_foreach_on_meta")
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], AT_THE_LIMITS])
def test_adamw_takes_what_the_real_one_does_event_by_event(shapes: tuple[tuple[int, ...], ...], clips: bool) -> None:
    trained = parameters(shapes)
    found = [predicted(Optimizer.ADAMW_TORCH, trained, name, clips=clips) for name in (FIRST, LATER)]
    assert found == recorded(trained, clips=clips)
    assert any(size < 0 for _, size in found[1])


def test_a_later_step_leaves_nothing_and_the_first_leaves_the_state() -> None:
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


@pytest.mark.parametrize("shape", AT_THE_LIMITS)
def test_8_bit_states_are_those_of_bitsandbytes(shape: tuple[int, ...]) -> None:
    (parameter,) = trained = parameters([shape], "cpu")
    real = bitsandbytes.optim.AdamW8bit(trained)
    real.init_state(real.param_groups[0], parameter, 0, 0)
    levels = [value.nbytes for name, value in real.state[parameter].items() if name.startswith("qmap")]
    assert levels == ([MAP_BYTES] * 2 if parameter.numel() >= 4096 else [])
    found = [size for _, size in predicted(Optimizer.ADAMW_8BIT, trained, FIRST, clips=False)]
    assert found == [*levels, *state_sizes(real, parameter)]
    assert real.state[parameter]["state1"].element_size() == (1 if parameter.numel() >= 4096 else 4)


def test_the_levels_of_8_bit_states_are_there_once_and_made_with_the_first_that_needs_them() -> None:
    trained = parameters([(8, 8), (64, 128), (64, 128)])
    found = [size for _, size in predicted(Optimizer.ADAMW_8BIT, trained, FIRST, clips=False)]
    own = [8192, 8192, 8192 // 256 * 4, 8192 // 256 * 4]
    assert found == [256, 256, MAP_BYTES, MAP_BYTES, *own, *own]


@pytest.mark.parametrize("shape", AT_THE_LIMITS)
@pytest.mark.parametrize(
    ("optimizer", "real_class"),
    [
        (Optimizer.PAGED_ADAMW_8BIT, bitsandbytes.optim.PagedAdamW8bit),
        (Optimizer.PAGED_ADAMW_32BIT, bitsandbytes.optim.PagedAdamW32bit),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_states_are_out_of_the_pool_from_100_000_numbers_on(
    shape: tuple[int, ...], optimizer: Optimizer, real_class: Any
) -> None:
    """On a CPU bitsandbytes pages nothing, so what is paged on a GPU is told by its rule: `numel() < 1e5` is not."""
    (parameter,) = trained = parameters([shape], "cpu")
    real = real_class(trained)
    real.init_state(real.param_groups[0], parameter, 0, 0)
    state = real.state[parameter]
    steps = optimizer_steps(optimizer, trained, clips=False)
    is_paged = parameter.numel() >= 1e5
    assert steps.paged_bytes == (state["state1"].nbytes + state["state2"].nbytes if is_paged else 0)
    in_pool = sum(steps.passes.storages[number].num_bytes for number in steps.passes.permanent)
    levels = 2 * MAP_BYTES if "qmap1" in state else 0
    assert in_pool + steps.paged_bytes == sum(state_sizes(real, parameter)) + levels


def test_fused_adamw_takes_no_temporaries_and_keeps_its_counters_on_the_device() -> None:
    trained = parameters(SHAPES)
    found = predicted(Optimizer.ADAMW_TORCH_FUSED, trained, FIRST, clips=False)
    assert [size for _, size in found] == [
        size for parameter in trained for size in (4, parameter.numel() * 4, parameter.numel() * 4)
    ]
    assert predicted(Optimizer.ADAMW_TORCH_FUSED, trained, LATER, clips=False) == []
    real = torch.optim.AdamW(parameters(SHAPES, "cpu"), fused=True)
    real.step()
    assert [[value.nbytes for value in state.values()] for state in real.state.values()] == [
        [4, parameter.numel() * 4, parameter.numel() * 4] for parameter in trained
    ]


def test_more_trained_numbers_take_more_in_every_optimizer() -> None:
    for optimizer in Optimizer:
        totals = []
        for width in (64, 4096, 65536):
            steps = optimizer_steps(optimizer, parameters([(8, width)]), clips=True)
            kept = sum(steps.passes.storages[number].num_bytes for number in steps.passes.permanent)
            totals.append(kept + steps.paged_bytes)
        assert all(less < more for less, more in pairwise(totals)), optimizer
