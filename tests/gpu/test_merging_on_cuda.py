"""A run trained on a GPU is merged on the CPU: both have equal 4-bit weights, and so the same model."""

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

from qlora_cli.loading.loader import load_model
from qlora_cli.merging.merge_run import merge
from qlora_cli.merging.planning.base_weights import Base, parameter_groups
from qlora_cli.merging.planning.inputs import read_inputs
from qlora_cli.settings.choices import BaseWeights, Device
from qlora_cli.settings.models import LoadSettings, ModelSettings
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.support.runs.merge_command import merge_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def ended(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on the GPU in bf16."""
    directory = tmp_path_factory.mktemp("runs")
    lines = (base_model.parent / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = train_settings(
        base_model,
        directory / "rows.jsonl",
        directory / "run",
        model__dtype="bf16",
        model__device="cuda",
        training__max_steps=10,
    )
    train(settings, Recorder())
    return directory / "run"


def test_the_round_trip_on_the_cpu_is_what_the_gpu_computes_with(ended: Path) -> None:
    inputs = read_inputs(merge_settings(ended), Recorder())
    base, groups = Base(inputs.base, BaseWeights.DEQUANTIZED), parameter_groups(inputs.base.groups)
    settings = LoadSettings(model=ModelSettings(name=str(ended), device=Device.CUDA))
    compared = 0
    for name, module in load_model(settings).base.named_modules():
        if isinstance(module, Linear4bit):
            on_gpu = functional.dequantize_4bit(module.weight.data, module.weight.quant_state).cpu()
            weight = f"{name}.weight".replace(".base_layer", "")
            assert torch.equal(base.parameters(groups[weight])[weight], on_gpu), weight
            compared += 1
    assert compared == 28


@pytest.mark.parametrize("base", ["auto", "original", "dequantized"])
def test_a_run_on_the_gpu_is_merged_and_compared_on_the_gpu(ended: Path, tmp_path: Path, base: str) -> None:
    settings = merge_settings(ended, output=tmp_path / "merged", base=base, device=Device.CUDA)
    result = merge(settings, Recorder())
    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.device.startswith("cuda")
    assert result.verification.divergence.top_token_agreement > 0.9
    assert result.num_merged_tensors == 28
