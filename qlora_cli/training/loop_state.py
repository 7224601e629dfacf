"""What it takes to go on as if nothing had happened, beyond what transformers keeps in a checkpoint."""

import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

LOOP_STATE = "loop_state.json"
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
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Draw what you like: afterwards the generators are as before, so that training goes on as if you had not."""
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
        """Read it from a checkpoint, whose files were checked."""
        content = json.loads((folder / LOOP_STATE).read_text(encoding="utf-8"))
        progress = content.pop("progress")
        evaluations = {int(step): loss for step, loss in progress.pop("eval_losses").items()}
        return cls(**content, progress=Progress(**progress, eval_losses=evaluations))
