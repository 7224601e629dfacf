"""Runs that are killed: what is left of one after a checkpoint, and whether it resumes as if nothing had happened."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import CheckpointSaved
from qlora_cli.runs.history import read_history
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.train_run import train
from tests.conftest import Recorder

# Dropout draws, an epoch ends within a step, and reports come every second step: all of it has to resume exactly.
EXACT: dict[str, object] = {
    "lora__dropout": 0.1,
    "lora__target_modules": ["q_proj", "down_proj"],  # as good as all of them to a resume, in less time
    "data__eval_split": "3",
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 2,
    "training__max_steps": 13,
    "training__eval_steps": 4,
    "training__save_steps": 1,
    "training__logging_steps": 2,
    "training__neftune_noise_alpha": 5,
}


def metrics_of(run: Path) -> list[tuple[Any, ...]]:
    """Return the reports of a run, without times and memory."""
    history = read_history(run)
    steps = history.steps
    return [
        *zip(steps.step, steps.loss, steps.learning_rate, steps.grad_norm, steps.num_tokens, strict=True),
        *((evaluation.step, evaluation.loss, evaluation.is_best) for evaluation in history.evaluations),
    ]


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def result_of(run: Path) -> dict[str, Any]:
    """Return the result in `run.json`, without times, memory and paths."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "done"
    keys = ("steps", "num_steps", "epochs", "final_loss", "train_loss", "eval_loss", "num_tokens", "best_step")
    return {key: record["result"][key] for key in (*keys, "best_eval_loss", "num_skipped_steps")}


def assert_same(run: Path, whole: Path) -> None:
    assert adapter_of(run) == adapter_of(whole)
    assert metrics_of(run) == metrics_of(whole)
    assert result_of(run) == result_of(whole)


class Copier(Recorder):
    """Copies a run as a process killed after the checkpoint of one of `steps` would leave it."""

    def __init__(self, run: Path, *steps: int) -> None:
        super().__init__()
        self._run, self._steps = run, steps

    def report(self, event: object) -> None:
        if isinstance(event, CheckpointSaved) and event.step in self._steps:
            shutil.copytree(self._run, copy_at(self._run, event.step))


def copy_at(run: Path, step: int) -> Path:
    return run.with_name(f"{run.name}-killed-at-{step}")


def place_killed(run: Path, step: int, target: Path) -> None:
    """Copy what a `Copier` saved to `target`, as the run of a process that trained there.

    If `target` has the same name as the run, paths next to the run, such as its rows, become paths next to `target`.
    """
    shutil.copytree(copy_at(run, step), target)
    before, now = (run.parent, target.parent) if run.name == target.name else (run, target)
    record = target / "run.json"
    content = record.read_text(encoding="utf-8")
    assert f"{before}/" in content or f'{before}"' in content
    assert json.loads(content)["status"] == "running"
    record.write_text(content.replace(str(before), str(now)), encoding="utf-8")


def stopped_at(settings: Resolved[TrainSettings], step: int) -> None:
    """Train, and stop after the checkpoint of `step`, leaving the run as a killed process would."""
    kill_after(settings, step)
    record = settings.settings.output.directory / "run.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({**content, "status": "running"}), encoding="utf-8")


def kill_after(settings: Resolved[TrainSettings], step: int) -> None:
    """Train until the checkpoint of `step`, and leave the run as an exception does that nothing handles."""
    with pytest.raises(Killed):
        train(settings, Killer(step))


class Killer(Recorder):
    """Kills a run after the checkpoint of `step`."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, event: object) -> None:
        if isinstance(event, CheckpointSaved) and event.step == self._step:
            raise Killed


class Killed(BaseException):
    """Passes every handler, as a signal would."""
