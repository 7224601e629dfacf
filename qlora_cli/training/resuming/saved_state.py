"""The pickles of a checkpoint: whether they hold values of the types and shapes that a run saves.

Whoever writes a checkpoint can seal it, so that none of it is taken on trust.
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
# What libraries raise over values of other types and shapes than they saved.
MISFITS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError, AssertionError)
LIKE_THE_WEIGHT = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2"})
BLOCK, CODES = 256, 256  # of 8-bit states: numbers to a scale, and entries of their table


def why_no_optimizer(found: Mapping[str, Any]) -> str | None:
    """Return why this is no state of an optimizer; None if it may be one."""
    groups, state = found["param_groups"], found["state"]
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        return "param_groups is no list of groups"
    for group in groups:
        if not isinstance(group.get("params"), list) or not all(type(one) is int for one in group["params"]):
            return "params of a group are no list of numbers"
        if not _is_number(group.get("lr")):
            return "lr of a group is no number"
    if not isinstance(state, dict) or not all(isinstance(of_one, dict) for of_one in state.values()):
        return "state is not that of weights by number"
    values = [value for of_one in state.values() for value in of_one.values()]
    inner = [value for part in values if isinstance(part, dict) for value in part.values()]  # as bitsandbytes wraps it
    flat = [*(value for value in values if not isinstance(value, dict)), *inner]
    return None if all(value is None or _is_number(value) for value in flat) else "state holds what is no number"


def why_no_schedule(found: Mapping[str, Any]) -> str | None:
    """Return why this is no state of a schedule; None if it may be one."""
    if type(found["last_epoch"]) is not int or found["last_epoch"] < 0:
        return "last_epoch is no number of steps"
    for key in ("base_lrs", "_last_lr"):
        rates = found.get(key, [])
        if not isinstance(rates, list) or not all(map(_is_number, rates)):
            return f"{key} is no list of learning rates"
    return None


def why_no_generators(found: Mapping[str, Any]) -> str | None:
    """Return why these are no states of random generators; None if each can be put into one."""
    tried: Mapping[str, Callable[[Any], object]] = {
        "python": random.Random().setstate,  # noqa: S311 - no secret
        "numpy": np.random.RandomState().set_state,
        "cpu": torch.Generator().set_state,
    }
    for name, put in tried.items():
        try:
            put(found[name])
        except MISFITS as error:
            return f"{name}: {error}"
    if not 0 <= found["numpy"][2] <= len(found["numpy"][1]):  # numpy reads beyond the end otherwise
        return "numpy: the place in the state is not within it"
    if "cuda" in found and not isinstance(found["cuda"], torch.Tensor):
        return "cuda: it is no tensor"
    return None


def why_no_scaler(found: Mapping[str, Any]) -> str | None:
    """Return why this is no state of a loss scaler; None if it may be one."""
    return None if all(map(_is_number, found.values())) else "it holds what is no number"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | torch.Tensor)


def _is_misfit(error: Exception) -> bool:
    """Whether values can have raised an error, rather than the machine."""
    return isinstance(error, MISFITS) and not is_out_of_memory(error) and "CUDA" not in str(error)


@contextmanager
def blamed(file: Path) -> Iterator[None]:
    """Take an error over values for a fault of the `file` that they come from.

    Raises:
        OutputDirectoryError: there is one; names the file.
    """
    try:
        yield
    except MISFITS as error:
        if not _is_misfit(error):
            raise
        raise odd(file, str(error).split("\n", maxsplit=1)[0]) from error


def odd(file: Path, reason: str) -> OutputDirectoryError:
    """Return the error of a file of a checkpoint that is not what a run saves."""
    return OutputDirectoryError(
        f"{file} is not what a run saves: {reason}",
        hint=f"Move {file.parent} away to resume from the checkpoint before it, or restart with another --output.",
    )


def groups_of(optimizer: Optimizer) -> list[dict[str, object]]:
    """Return what an optimizer goes by, group by group, without the weights."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def check_optimizer(optimizer: Optimizer, own: list[dict[str, object]], file: Path) -> None:
    """Check that an optimizer, which had groups of its `own`, can step with what it was given from `file`.

    Raises:
        OutputDirectoryError: it can't; names the file.
    """
    for group, before in zip(optimizer.param_groups, own, strict=True):
        for key, value in before.items():
            if _kind(value) is not None and _kind(value) != _kind(group.get(key)):
                raise odd(file, f"{key} of a group is not what this optimizer takes")
        for weight in group["params"]:
            for key, value in optimizer.state.get(weight, {}).items():
                if not _fits(key, value, weight):
                    raise odd(file, f"{key} is {tuple(value.shape)}, for a weight that is {tuple(weight.shape)}")


def _kind(value: object) -> object:
    """Return what another value has to have in common with one that is computed with; None of any other."""
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return "number" if _is_number(value) and not isinstance(value, bool) else None


def _fits(key: str, value: object, weight: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return key not in LIKE_THE_WEIGHT
    if key in LIKE_THE_WEIGHT:
        return value.shape == weight.shape
    if key == "step":
        return value.numel() == 1
    if key.startswith("absmax"):
        return value.numel() == -(-weight.numel() // BLOCK)
    return not key.startswith("qmap") or value.numel() == CODES


def check_schedule(schedule: LRScheduler, own: Mapping[str, object], file: Path) -> None:
    """Check that a schedule, whose state was its `own`, can continue with the state that it was given from `file`.

    Raises:
        OutputDirectoryError: it can't; names the file.
    """
    for key, value in schedule.state_dict().items():
        if key in own and _kind(own[key]) is not None and _kind(own[key]) != _kind(value):
            raise odd(file, f"{key} is not what this schedule takes")
        if key not in own and hasattr(type(schedule), key):
            raise odd(file, f"{key} is no value of a schedule")


def file_that_failed_a_step(error: Exception) -> str | None:
    """Return which file holds the state that a misfit came of, if an optimizer or a schedule raised it."""
    trace: TracebackType | None = error.__traceback__ if _is_misfit(error) else None
    while trace is not None:
        whose = trace.tb_frame.f_locals.get("self")
        if isinstance(whose, Optimizer | LRScheduler):
            return OPTIMIZER if isinstance(whose, Optimizer) else SCHEDULER
        trace = trace.tb_next
    return None
