"""The main job on a GPU, in bf16: the same claims as on the CPU, and its memory is measured."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit

from qlora_cli.events import StepDone
from qlora_cli.settings.choices import Optimizer
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run
from tests.conftest import Recorder, train_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("optimizer", [optimizer.value for optimizer in Optimizer])
def test_training_on_cuda(base_model: Path, rows: Path, tmp_path: Path, optimizer: str) -> None:
    settings = train_settings(
        base_model,
        rows,
        tmp_path / "run",
        model__dtype="auto",
        model__device="cuda",
        training__optimizer=optimizer,
        training__max_steps=5,
        data__eval_split="3",
    )
    prepared = prepare_run(settings, Recorder())
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in prepared.model.named_parameters()
        if not parameter.requires_grad
    }
    result = run(prepared, Recorder())
    kinds = Counter(
        (isinstance(parameter, Params4bit), parameter.dtype, parameter.requires_grad)
        for parameter in prepared.model.parameters()
    )
    rest = prepared.loaded.dtype.torch_dtype
    assert kinds == {(True, torch.uint8, False): 28, (False, torch.float32, True): 56, (False, rest, False): 10}
    for name, parameter in prepared.model.named_parameters():
        assert parameter.device.type == "cuda"
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    assert prepared.plan.gradient_checkpointing == "off"  # planned: the model is tiny
    assert result.final_loss is not None
    assert result.eval_loss is not None
    peak = result.peak_memory
    assert peak.device_allocated_bytes is not None
    assert peak.device_reserved_bytes is not None
    assert 0 < peak.device_allocated_bytes <= peak.device_reserved_bytes


def test_bf16_is_chosen_from_ampere_on(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(
        train_settings(base_model, rows, tmp_path / "run", model__dtype="auto", model__device="cuda"), Recorder()
    )
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    assert prepared.plan.compute_dtype == expected


def test_checkpointing_changes_memory_not_results(base_model: Path, rows: Path, tmp_path: Path) -> None:
    losses = []
    for switch in ("on", "selective", "offload"):
        settings = train_settings(
            base_model, rows, tmp_path / switch, model__device="cuda", training__gradient_checkpointing=switch
        )
        prepared = prepare_run(settings, Recorder())
        assert prepared.plan.gradient_checkpointing == switch
        losses.append(run(prepared, Recorder()).final_loss)
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)


def test_short_rows_fill_micro_batches_with_the_losses_of_one_row_at_a_time(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    losses = []
    for tokens in (None, 300):
        settings = train_settings(
            base_model,
            rows,
            tmp_path / f"run-{tokens}",
            model__device="cuda",
            training__micro_batch_size=1,
            training__gradient_accumulation_steps=6,
            training__micro_batch_tokens=tokens,
        )
        recorder = Recorder()
        prepared = prepare_run(settings, recorder)
        assert prepared.plan.micro_batch_tokens == tokens  # the trial on the loaded model keeps rows apart
        run(prepared, recorder)
        losses.append([event.loss for event in recorder.events if isinstance(event, StepDone)])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
