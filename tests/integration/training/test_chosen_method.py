"""`--quant auto`: a run is stored as it fits on its GPU, is the run with that method, and stays it when it resumes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Noted
from qlora_cli.loading.save import save_quantized
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.settings.choices import Quantization
from qlora_cli.training.checks import memory_plan
from qlora_cli.training.run_plan import settle_run
from qlora_cli.training.train_run import train
from qlora_cli.units import GIB
from tests.conftest import Recorder, train_settings
from tests.support.models.loading import load

METHOD = "quantization.method"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """Plan for the GPU in this list, on which everything fits at first."""
    gpus = [replace(find_gpu("RTX 4090"), total_bytes=GIB, context_bytes=0, context_high_bytes=0)]
    monkeypatch.setattr(memory_plan, "current_gpu", lambda _: gpus[0])
    return gpus


def notes_of(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, Noted)]


def record_of(run: Path) -> dict[str, Any]:
    record = json.loads((run / "run.json").read_text())
    assert isinstance(record, dict)
    return record


@pytest.mark.usefixtures("gpu")
def test_a_run_is_that_with_the_method_that_was_chosen(base_model: Path, rows: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    train(train_settings(base_model, rows, tmp_path / "auto", quantization__method="auto"), recorder)
    (chosen,) = [note for note in notes_of(recorder) if note.startswith("planned: --quant")]
    assert chosen.startswith("planned: --quant none, the least quantization that fits: none off ")
    record = record_of(tmp_path / "auto")
    assert record["settings"]["quantization"]["method"] == "none"
    assert record["origins"][METHOD] == "the plan for this GPU"
    assert record["asked"]["quantization"]["method"] == "auto"
    train(train_settings(base_model, rows, tmp_path / "none", quantization__method="none"), Recorder())
    assert (tmp_path / "auto" / WEIGHTS).read_bytes() == (tmp_path / "none" / WEIGHTS).read_bytes()


def test_what_does_not_fit_in_16_bit_is_quantized(
    base_model: Path, rows: Path, tmp_path: Path, gpu: list[Gpu]
) -> None:
    flags = {"training__micro_batch_size": 1, "lora__rank": 1}
    least = settle_run(
        train_settings(base_model, rows, tmp_path / "run", **flags, training__gradient_checkpointing="on"), Recorder()
    )
    assert least.outlook is not None
    high = least.outlook.estimate.predicted.process_high_bytes
    gpu[0] = replace(gpu[0], total_bytes=gpu[0].total_bytes - gpu[0].usable_bytes + high)
    recorder = Recorder()
    asked = train_settings(base_model, rows, tmp_path / "run", **flags, quantization__method="auto")
    settled = settle_run(asked, recorder)
    assert settled.resolved.settings.quantization.method == Quantization.NF4
    assert settled.load_plan.settings.quantization.method == Quantization.NF4
    assert settled.load_plan.layout.is_quantized
    (chosen,) = [note for note in notes_of(recorder) if note.startswith("planned: --quant")]
    assert chosen.startswith("planned: --quant nf4, the least quantization that fits: none ")


def test_without_a_gpu_it_is_the_default(base_model: Path, rows: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    settled = settle_run(train_settings(base_model, rows, tmp_path / "run", quantization__method="auto"), recorder)
    assert settled.resolved.settings.quantization.method == Quantization.NF4
    assert "--quant auto is --quant nf4: without a GPU, nothing says what fits" in notes_of(recorder)


def test_a_resumed_run_stays_with_its_method(base_model: Path, rows: Path, tmp_path: Path, gpu: list[Gpu]) -> None:
    flags: dict[str, Any] = {"quantization__method": "auto", "training__schedule": "constant"}
    flags["training__gradient_checkpointing"] = "off"
    train(train_settings(base_model, rows, tmp_path / "run", **flags), Recorder())
    recorder = Recorder()
    train(train_settings(base_model, rows, tmp_path / "run", **flags), recorder)
    assert any("it is done: nothing is left to train" in note for note in notes_of(recorder))
    gpu[0] = replace(gpu[0], total_bytes=gpu[0].total_bytes // 1000)
    recorder = Recorder()
    asked = train_settings(base_model, rows, tmp_path / "run", **flags, training__max_steps=5)
    train(asked, recorder, force=True)
    assert not [note for note in notes_of(recorder) if note.startswith("planned: --quant")]
    record = record_of(tmp_path / "run")
    assert record["settings"]["quantization"]["method"] == "none"
    assert record["origins"][METHOD] == "the plan for this GPU"
    assert record["result"]["steps"] == 5


@pytest.mark.usefixtures("gpu")
def test_a_checkpoint_or_a_run_that_is_stored_in_one_way_stays_so(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    save_quantized(load(base_model), tmp_path / "nf4", Recorder())
    train(train_settings(base_model, rows, tmp_path / "int8", quantization__method="int8"), Recorder())
    for model, method in ((tmp_path / "nf4", Quantization.NF4), (tmp_path / "int8", Quantization.INT8)):
        recorder = Recorder()
        settled = settle_run(train_settings(model, rows, tmp_path / "run", quantization__method="auto"), recorder)
        assert settled.resolved.settings.quantization.method == method
        assert not [note for note in notes_of(recorder) if note.startswith("planned: --quant")]
