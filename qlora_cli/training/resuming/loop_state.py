"""The state that makes a resumed run exact, beyond what transformers writes into a checkpoint."""

import json
import math
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from transformers.trainer_pt_utils import safe_globals

from qlora_cli.bounded import within_bytes
from qlora_cli.events import Rewards
from qlora_cli.files import read_small
from qlora_cli.runs.checkpoints import TRAINER_STATE, step_of
from qlora_cli.training.resuming.saved_state import (
    OPTIMIZER,
    PEERS,
    RNG_STATE,
    SCALER,
    SCHEDULER,
    generators_problem,
    invalid_file_error,
    optimizer_problem,
    scaler_problem,
    schedule_problem,
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
    """Restore the random generators to `states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def load_generators(checkpoint: Path) -> Sequence[Generators]:
    """Restore the random generators from a checkpoint; return those of further processes, by rank."""
    file = checkpoint / RNG_STATE
    if not file.exists():
        return ()
    states = _values_of(file)
    set_generators(states)
    of_peers: Sequence[Generators] = states.get(PEERS, ())
    return of_peers


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore the generators afterwards, so that draws in between do not change training."""
    states = generator_states()
    try:
        yield
    finally:
        set_generators(states)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The figures that a run has reported so far, for its result. `eval_losses` and `eval_rewards` are by step.

    `stepping_seconds` counts the steps alone, `elapsed_seconds` the loop with evaluations and checkpoints,
    `loading_seconds` the time before it, each over all processes that led to this step.
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
    last_rewards: Rewards | None = None
    eval_rewards: Mapping[int, Rewards] = field(default_factory=dict)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest finite held-out loss; the first of equals."""
        losses = {step: loss for step, loss in self.eval_losses.items() if math.isfinite(loss)}
        return min(losses, key=lambda step: losses[step]) if losses else None

    @property
    def num_since_best(self) -> int:
        """The number of evaluations after the best one."""
        steps = list(self.eval_losses)
        return len(steps) if self.best_step is None else len(steps) - 1 - steps.index(self.best_step)


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """The loop after a step.

    Attributes:
        step: The step.
        summed_loss: The loss of the steps not reported yet, with `logging_steps` above 1.
        total_loss: The loss of the steps that were reported.
        reported_step: The last reported step.
        num_tokens: The tokens trained so far, without padding.
        means: The values that TRL will report the mean of, by name.
        never_used: Layers with an adapter that were not called in the rehearsal.
        progress: The reported figures.
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
        """Write the state into a checkpoint."""
        (folder / LOOP_STATE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "LoopState":
        """Read the state from a checkpoint whose files were checked.

        Raises:
            OutputDirectoryError: the file is invalid; names it.
        """
        return _parse(_LOOP_STATES, folder / LOOP_STATE)


class _TrainerState(BaseModel):
    """The trainer state that transformers resumes from, with the types that it writes."""

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
# The pickles of a checkpoint: the keys that each must have, and the function that validates it.
PICKLES: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], str | None]]] = {
    OPTIMIZER: (("state", "param_groups"), optimizer_problem),
    SCHEDULER: (("last_epoch",), schedule_problem),
    RNG_STATE: (("python", "numpy", "cpu"), generators_problem),
    SCALER: ((), scaler_problem),
}


def check_state(checkpoint: Path) -> None:
    """Check that a run can resume from a checkpoint with valid checksums, before anything is written or loaded.

    Checksums don't prove who wrote it. No code in its pickles is run.

    Raises:
        OutputDirectoryError: it holds something that a run does not save; names the file.
    """
    step = LoopState.read(checkpoint).step
    file = checkpoint / TRAINER_STATE
    state = _parse(_TRAINER_STATES, file)
    if not state.global_step == step == step_of(checkpoint):
        raise invalid_file_error(file, f"it is of step {state.global_step}, and {LOOP_STATE} of step {step}")
    for name, (keys, problem_of) in PICKLES.items():
        if (checkpoint / name).exists():
            content = _read_pickle(checkpoint / name, keys)
            if reason := problem_of(content):
                raise invalid_file_error(checkpoint / name, reason)


def _read_pickle(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = within_bytes(partial(_values_of, file), MOST_BYTES + 2 * file.stat().st_size)
    except MemoryError as error:
        raise invalid_file_error(file, "it takes far more memory than it is large") from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        LookupError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise invalid_file_error(file, "it holds more than values, or is damaged") from error
    if not isinstance(content, dict) or not all(key in content for key in keys):
        raise invalid_file_error(file, f"it does not hold {', '.join(keys) or 'values by name'}")
    return content


def _values_of(file: Path) -> Any:
    device = "cpu" if file.name == RNG_STATE else "meta"  # small, and its states are tried
    with safe_globals():
        return torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))


def _parse(kind: TypeAdapter[Value], file: Path) -> Value:
    try:
        return kind.validate_python(json.loads(read_small(file)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"]))
        raise invalid_file_error(file, f"{location}: {first['msg']}" if location else first["msg"]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise invalid_file_error(file, str(error)) from error
