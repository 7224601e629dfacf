"""Validate the pickles of a checkpoint: their values must have the types and shapes that a run saves.

Anyone can write a checkpoint with valid checksums, so nothing in it is trusted.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qlora_cli.errors import OutputDirectoryError
from qlora_cli.hardware.counters import is_out_of_memory

OPTIMIZER, SCHEDULER, RNG_STATE, SCALER = "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"
PEERS = "peers"  # in `RNG_STATE`: the generators of the processes after the first, by rank
# What libraries raise for values of unexpected types and shapes.
VALUE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError, AssertionError)
SHAPED_LIKE_WEIGHT = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2"})
BLOCK, CODES = 256, 256  # of 8-bit states: values per scale, and entries of the code table


def optimizer_problem(content: Mapping[str, Any]) -> str | None:
    """Return why `content` is not the state of an optimizer; None if it may be one."""
    groups, state = content["param_groups"], content["state"]
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        return "param_groups is not a list of groups"
    for group in groups:
        if not isinstance(group.get("params"), list) or not all(type(one) is int for one in group["params"]):
            return "params of a group are not a list of numbers"
        if not _is_number(group.get("lr")):
            return "lr of a group is not a number"
    if not isinstance(state, dict) or not all(isinstance(of_one, dict) for of_one in state.values()):
        return "state is not a mapping by number of weight"
    values = [value for of_one in state.values() for value in of_one.values()]
    inner = [
        value for part in values if isinstance(part, dict) for value in part.values()
    ]  # bitsandbytes nests its states
    flat = [*(value for value in values if not isinstance(value, dict)), *inner]
    return (
        None if all(value is None or _is_number(value) for value in flat) else "state holds other values than numbers"
    )


def schedule_problem(content: Mapping[str, Any]) -> str | None:
    """Return why `content` is not the state of a schedule; None if it may be one."""
    if type(content["last_epoch"]) is not int or content["last_epoch"] < 0:
        return "last_epoch is not a number of steps"
    for key in ("base_lrs", "_last_lr"):
        rates = content.get(key, [])
        if not isinstance(rates, list) or not all(map(_is_number, rates)):
            return f"{key} is not a list of learning rates"
    return None


def generators_problem(content: Mapping[str, Any]) -> str | None:
    """Return why `content` is not the states of random generators; None if generators accept them."""
    setters: Mapping[str, Callable[[Any], object]] = {
        "python": random.Random().setstate,  # noqa: S311 - not a secret
        "numpy": np.random.RandomState().set_state,
        "cpu": torch.Generator().set_state,
    }
    for name, set_state in setters.items():
        try:
            set_state(content[name])
        except VALUE_ERRORS as error:
            return f"{name}: {error}"
    if not 0 <= content["numpy"][2] <= len(content["numpy"][1]):  # numpy reads beyond the end otherwise
        return "numpy: the position in the state is out of range"
    if "cuda" in content and not isinstance(content["cuda"], torch.Tensor):
        return "cuda: it is not a tensor"
    of_peers = content.get(PEERS, [])
    if not isinstance(of_peers, list) or not all(isinstance(states, dict) for states in of_peers):
        return f"{PEERS}: it is not a list of states"
    return next((f"{PEERS}: {reason}" for states in of_peers if (reason := generators_problem(states))), None)


def scaler_problem(content: Mapping[str, Any]) -> str | None:
    """Return why `content` is not the state of a loss scaler; None if it may be one."""
    return None if all(map(_is_number, content.values())) else "it holds other values than numbers"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | torch.Tensor)


def _is_value_error(error: Exception) -> bool:
    """Return whether an error can be caused by invalid values, rather than by the machine."""
    return isinstance(error, VALUE_ERRORS) and not is_out_of_memory(error) and "CUDA" not in str(error)


@contextmanager
def blame_file(file: Path) -> Iterator[None]:
    """Convert an error caused by values to one that names the `file` that they come from.

    Raises:
        OutputDirectoryError: there is such an error; names the file.
    """
    try:
        yield
    except VALUE_ERRORS as error:
        if not _is_value_error(error):
            raise
        raise invalid_file_error(file, str(error).split("\n", maxsplit=1)[0]) from error


def invalid_file_error(file: Path, reason: str) -> OutputDirectoryError:
    """Return the error for a checkpoint's file that is not what a run saves."""
    return OutputDirectoryError(
        f"{file} is not what a run saves: {reason}",
        hint=f"Move {file.parent} away to resume from the checkpoint before it, or restart with another --output.",
    )


def groups_of(optimizer: Optimizer) -> list[dict[str, object]]:
    """Return the hyperparameters of an optimizer, group by group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def check_optimizer(optimizer: Optimizer, own: list[dict[str, object]], file: Path) -> None:
    """Check that an optimizer, which had the groups `own`, can step with the state that was loaded from `file`.

    Raises:
        OutputDirectoryError: it can't; names the file.
    """
    for group, before in zip(optimizer.param_groups, own, strict=True):
        for key, value in before.items():
            if _kind(value) is not None and _kind(value) != _kind(group.get(key)):
                raise invalid_file_error(file, f"{key} of a group does not fit this optimizer")
        for weight in group["params"]:
            for key, value in optimizer.state.get(weight, {}).items():
                if not _fits(key, value, weight):
                    raise invalid_file_error(
                        file, f"{key} is {tuple(value.shape)}, for a weight that is {tuple(weight.shape)}"
                    )


@contextmanager
def optimizer_checked(optimizer: Optimizer, schedule: Any, checkpoint: Path) -> Iterator[None]:
    """Check that the states that are loaded meanwhile are of this optimizer and this schedule.

    Raises:
        OutputDirectoryError: they are not; names the file.
    """
    groups, state = groups_of(optimizer), schedule.state_dict()
    with blame_file(checkpoint / OPTIMIZER):
        yield
        check_optimizer(optimizer, groups, checkpoint / OPTIMIZER)
    check_schedule(schedule, state, checkpoint / SCHEDULER)


def _kind(value: object) -> object:
    """Return the kind of a value used in computations, which a loaded one must share; None for any other value."""
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return "number" if _is_number(value) and not isinstance(value, bool) else None


def _fits(key: str, value: object, weight: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return key not in SHAPED_LIKE_WEIGHT
    if key in SHAPED_LIKE_WEIGHT:
        return value.shape == weight.shape
    if key == "step":
        return value.numel() == 1
    if key.startswith("absmax"):
        return value.numel() == -(-weight.numel() // BLOCK)
    return not key.startswith("qmap") or value.numel() == CODES


def check_schedule(schedule: LRScheduler, own: Mapping[str, object], file: Path) -> None:
    """Check that a schedule, which had the state `own`, can continue with the state that was loaded from `file`.

    Raises:
        OutputDirectoryError: it can't; names the file.
    """
    for key, value in schedule.state_dict().items():
        if key in own and _kind(own[key]) is not None and _kind(own[key]) != _kind(value):
            raise invalid_file_error(file, f"{key} does not fit this schedule")
        if key not in own and hasattr(type(schedule), key):
            raise invalid_file_error(file, f"{key} is not a value of a schedule")


def file_that_failed_a_step(error: Exception) -> str | None:
    """Return the file with the state that caused an error, if an optimizer or a schedule raised it."""
    trace: TracebackType | None = error.__traceback__ if _is_value_error(error) else None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, Optimizer | LRScheduler):
            return OPTIMIZER if isinstance(owner, Optimizer) else SCHEDULER
        trace = trace.tb_next
    return None
