"""The state that makes a resumed run exact, beyond what transformers writes into a checkpoint."""

import json
import math
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from transformers.trainer_pt_utils import safe_globals

from qlora_cli.bounded import within_bytes
from qlora_cli.files import read_small
from qlora_cli.runs.checkpoints import TRAINER_STATE, step_of
from qlora_cli.training.resuming.saved_state import (
    OPTIMIZER,
    RNG_STATE,
    SCALER,
    SCHEDULER,
    odd,
    why_no_generators,
    why_no_optimizer,
    why_no_scaler,
    why_no_schedule,
)
from qlora_cli.units import MIB

Value = TypeVar("Value")

LOOP_STATE = "loop_state.json"
MOST_BYTES = 512 * MIB  # for a pickle, on top of twice its size
Generators = Mapping[str, Any]


def generator_states() -> Generators:
    """Return the states of all random generators, as transformers writes them into `rng_state.pth`."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: Generators) -> None:
    """Put the random generators back into `states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def load_generators(checkpoint: Path) -> None:
    """Give the random generators the states that a checkpoint holds."""
    file = checkpoint / RNG_STATE
    if file.exists():
        set_generators(_values_of(file))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the generators afterwards, so that draws made meanwhile do not change training."""
    states = generator_states()
    try:
        yield
    finally:
        set_generators(states)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run has reported so far, as its result will need it. `eval_losses` by step.

    `stepping_seconds` are those of steps alone, `elapsed_seconds` those of the loop with its evaluations and
    checkpoints, `loading_seconds` those before it, of all processes that led to this step.
    """

    loss_sum: float = 0.0
    num_losses: int = 0
    last_loss: float | None = None
    num_tokens: int = 0
    stepping_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    loading_seconds: float = 0.0
    num_skipped: int = 0
    eval_losses: Mapping[int, float]

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss that is a number; the first of equals."""
        losses = {step: loss for step, loss in self.eval_losses.items() if math.isfinite(loss)}
        return min(losses, key=lambda step: losses[step]) if losses else None

    @property
    def num_since_best(self) -> int:
        """The evaluations after the best one."""
        steps = list(self.eval_losses)
        return len(steps) if self.best_step is None else len(steps) - 1 - steps.index(self.best_step)


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """The loop after a step.

    Attributes:
        step: That step.
        summed_loss: Of the steps that were not reported yet, with `logging_steps` above 1.
        total_loss: Of those that were.
        reported_step: The last of them.
        num_tokens: Fed so far, padding left out.
        means: What TRL will report the mean of, by name.
        never_used: Layers with an adapter that were not called when they were tried.
        progress: What was reported.
    """

    step: int
    summed_loss: float
    total_loss: float
    reported_step: int
    num_tokens: int
    means: Mapping[str, list[float]]
    never_used: list[str]
    progress: Progress

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        (folder / LOOP_STATE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "LoopState":
        """Read it from a checkpoint, whose files were checked.

        Raises:
            OutputDirectoryError: it is none; names the file.
        """
        return _as(_LOOP_STATES, folder / LOOP_STATE)


class _TrainerState(BaseModel):
    """The trainer state that transformers resumes by, with the types that it writes."""

    global_step: int
    max_steps: int
    num_train_epochs: int
    epoch: float | None = None
    best_metric: float | None = None
    best_global_step: int | None = None
    total_flos: float = 0
    log_history: list[dict[str, Any]] = []
    stateful_callbacks: dict[str, Any] = {}


_LOOP_STATES = TypeAdapter(LoopState)
_TRAINER_STATES = TypeAdapter(_TrainerState)
# The pickles of a checkpoint: what each holds by name, and what says why it does not.
PICKLES: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], str | None]]] = {
    OPTIMIZER: (("state", "param_groups"), why_no_optimizer),
    SCHEDULER: (("last_epoch",), why_no_schedule),
    RNG_STATE: (("python", "numpy", "cpu"), why_no_generators),
    SCALER: ((), why_no_scaler),
}


def check_state(checkpoint: Path) -> None:
    """Check that a run can resume from a checkpoint whose files are sealed, before anything is written or loaded.

    Whoever writes a checkpoint can seal it. No code of its pickles runs.

    Raises:
        OutputDirectoryError: it holds something else than a run saves; names the file.
    """
    step = LoopState.read(checkpoint).step
    file = checkpoint / TRAINER_STATE
    state = _as(_TRAINER_STATES, file)
    if not state.global_step == step == step_of(checkpoint):
        raise odd(file, f"it is of step {state.global_step}, and {LOOP_STATE} of step {step}")
    for name, (keys, why_not) in PICKLES.items():
        if (checkpoint / name).exists():
            found = _read_pickle(checkpoint / name, keys)
            if reason := why_not(found):
                raise odd(checkpoint / name, reason)


def _read_pickle(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = within_bytes(partial(_values_of, file), MOST_BYTES + 2 * file.stat().st_size)
    except MemoryError as error:
        raise odd(file, "it takes far more memory than it is large") from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        LookupError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise odd(file, "it holds more than values, or is damaged") from error
    if not isinstance(found, dict) or not all(key in found for key in keys):
        raise odd(file, f"it does not hold {', '.join(keys) or 'values by name'}")
    return found


def _values_of(file: Path) -> Any:
    device = "cpu" if file.name == RNG_STATE else "meta"  # which is small, and tried
    with safe_globals():
        return torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))


def _as(kind: TypeAdapter[Value], file: Path) -> Value:
    try:
        return kind.validate_python(json.loads(read_small(file)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise odd(file, f"{place}: {first['msg']}" if place else first["msg"]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise odd(file, str(error)) from error
