"""On a GPU: a run that resumes exactly, scaled gradients, memory that really runs out before the first step."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted, Rehearsed, StepDone
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run, train
from tests.conftest import Recorder, train_settings
from tests.support.processes.killed_runs import kill_after

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

ON_CUDA: dict[str, object] = {"model__device": "cuda", "model__dtype": "auto", "training__max_steps": 8}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit"])
def test_a_run_resumes_exactly(base_model: Path, rows: Path, tmp_path: Path, optimizer: str) -> None:
    changed = {
        **ON_CUDA,
        "lora__dropout": 0.1,
        "training__full_determinism": True,
        "training__optimizer": optimizer,
        "training__save_steps": 2,
    }
    train(train_settings(base_model, rows, tmp_path / "whole", **changed), Recorder())
    kill_after(train_settings(base_model, rows, tmp_path / "run", **changed), 4)
    assert train(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder()).resumed_from_step == 4
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_gradients_that_a_scaler_makes_infinite_do_not_stop_a_run(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    changed = {**ON_CUDA, "model__dtype": "fp16"}
    result = train(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    assert result.steps == 8
    assert result.num_skipped_steps == 0


# The two workspaces of cuBLAS take 64 MiB of it on Hopper, the model 7 MiB; a row takes 8 MiB without checkpointing.
LITTLE_BYTES = 512 << 20
HELD_BYTES = 200 << 20


def repeated(rows: Path, times: int) -> Path:
    """Return a file with the rows so many times."""
    many = rows.with_name("many.jsonl")
    many.write_text(rows.read_text(encoding="utf-8") * times, encoding="utf-8")
    return many


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A GPU of which a process may use a few hundred MiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(LITTLE_BYTES / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_a_step_that_does_not_fit_is_reported_before_the_first_one(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    changed = {**ON_CUDA, "training__micro_batch_size": 96, "training__gradient_checkpointing": "off"}
    settings = train_settings(base_model, repeated(rows, 8), tmp_path / "run", **changed)
    prepared = prepare_run(settings, Recorder())
    held = torch.empty(HELD_BYTES, dtype=torch.uint8, device="cuda")
    recorder = Recorder()
    with pytest.raises(OutOfMemoryError) as caught:
        run(prepared, recorder)
    del held
    assert "tried before the first step" in str(caught.value)
    assert "measured" in str(caught.value)
    assert not [event for event in recorder.events if isinstance(event, StepDone)]


@pytest.mark.usefixtures("little_memory")
def test_the_micro_batch_is_halved_until_it_fits(base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {
        **ON_CUDA,
        "training__micro_batch_size": 512,
        "training__gradient_accumulation_steps": 1,
        "training__auto_micro_batch": True,
        "training__gradient_checkpointing": "off",
        "training__max_steps": 2,
    }
    recorder = Recorder()
    train(train_settings(base_model, repeated(rows, 60), tmp_path / "run", **changed), recorder)
    assert any("do not fit in memory: lowered to" in e.message for e in recorder.events if isinstance(e, Noted))
    (tried,) = [event for event in recorder.events if isinstance(event, Rehearsed)]
    assert tried.micro_batch_size < 512
    assert tried.device_allocated_bytes is not None
    plan = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["plan"]
    assert plan["micro_batch_size"] * plan["gradient_accumulation_steps"] == 512
