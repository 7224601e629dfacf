"""A sealed checkpoint with values that no run saves: resuming from it is an error that names the file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import QloraError
from qlora_cli.runs.checkpoints import CHECKSUMS_FILE, seal
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, train_settings
from tests.support.processes.killed_runs import kill_after

FAST = {"training__max_steps": 3, "training__save_steps": 1, "training__gradient_accumulation_steps": 1}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def rows_of_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def stopped(base_model: Path, rows_of_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    kill_after(train_settings(base_model, rows_of_run, run, **FAST), 2)
    return run


def first(state: Any) -> dict[str, Any]:
    """Return the state of the first weight."""
    moments: dict[str, Any] = state["state"][0]
    return moments


CHANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "moments of another shape": ("optimizer.pt", lambda state: first(state).update(exp_avg=torch.ones(3))),
    "moments that are missing": ("optimizer.pt", lambda state: first(state).pop("exp_avg")),
    "moments that are a number": ("optimizer.pt", lambda state: first(state).update(exp_avg=1.0)),
    "too few weights": ("optimizer.pt", lambda state: state["param_groups"][0]["params"].pop()),
    "a missing group": ("optimizer.pt", lambda state: state["param_groups"].pop()),
    "betas that are text": ("optimizer.pt", lambda state: state["param_groups"][0].update(betas="x")),
    "no eps": ("optimizer.pt", lambda state: state["param_groups"][0].pop("eps")),
    "rates of too few groups": ("scheduler.pt", lambda state: state.update(base_lrs=[])),
    "a method that is a number": ("scheduler.pt", lambda state: state.update(get_lr=5)),
    "another shape of a weight": (WEIGHTS, lambda state: state.update({min(state): torch.ones(3)})),
    "another name of a weight": (WEIGHTS, lambda state: state.update(other=state.pop(min(state)))),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_sealed_checkpoint_with_invalid_values_is_refused_with_exit_2_and_its_name(
    base_model: Path, rows_of_run: Path, stopped: Path, tmp_path: Path, what: str
) -> None:
    name, change = CHANGES[what]
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    checkpoint = run / "checkpoints" / "step-2"
    if name == WEIGHTS:
        weights = load_file(checkpoint / name)
        change(weights)
        save_file(weights, checkpoint / name, {"format": "pt"})
    else:
        state = torch.load(checkpoint / name, weights_only=True)
        change(state)
        torch.save(state, checkpoint / name)
    (checkpoint / CHECKSUMS_FILE).unlink()
    seal(checkpoint)
    with pytest.raises(QloraError) as caught:
        train(train_settings(base_model, rows_of_run, run, **FAST), Recorder())
    assert caught.value.exit_code == 2
    assert str(checkpoint) in str(caught.value)
    assert caught.value.hint
    assert checkpoint.is_dir()
