"""Choices of the loop that need a GPU: compiled code, Liger's kernels, deterministic ones."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.events import Event, StepDone
from qlora_cli.runs.record import read_record
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # compilers raise warnings of their own
]


class Losses(Recorder):
    """Records the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def report(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.losses.append(event.loss)


def losses_of(model: Path, rows: Path, output: Path, **flags: Any) -> list[float]:
    losses = Losses()
    values = {"model__dtype": "auto", "model__device": "cuda", **flags}
    train(train_settings(model, rows, output, **values), losses)
    return losses.losses


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_compiled_model_learns_the_same(base_model: Path, rows: Path, tmp_path: Path, checkpointing: str) -> None:
    flags = {"training__gradient_checkpointing": checkpointing}
    plain = losses_of(base_model, rows, tmp_path / "plain", **flags)
    compiled = losses_of(base_model, rows, tmp_path / "compiled", **flags, training__torch_compile=True)
    assert compiled == pytest.approx(plain, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_ligers_kernels_learn_the_same(base_model: Path, rows: Path, tmp_path: Path) -> None:
    plain = losses_of(base_model, rows, tmp_path / "plain")
    assert losses_of(base_model, rows, tmp_path / "liger", training__use_liger_kernel=True) == pytest.approx(
        plain, rel=0.02
    )


def test_deterministic_runs_are_equal_to_the_bit(base_model: Path, rows: Path, tmp_path: Path) -> None:
    flags = {"training__full_determinism": True, "lora__dropout": 0.1}
    runs = [tmp_path / "first", tmp_path / "second"]
    first, second = (losses_of(base_model, rows, run, **flags) for run in runs)
    assert first == second
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_layers_fused_with_their_adapters_learn_the_same_as_pefts(
    base_model: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    flags = {"quantization__method": method}
    by_peft = losses_of(base_model, rows, tmp_path / "peft", **flags, training__fused_lora=False)
    assert losses_of(base_model, rows, tmp_path / "fused", **flags) == pytest.approx(by_peft, rel=0.02)


def test_the_least_quantization_that_fits_is_trained(base_model: Path, rows: Path, tmp_path: Path) -> None:
    chosen = losses_of(base_model, rows, tmp_path / "auto", quantization__method="auto")
    assert losses_of(base_model, rows, tmp_path / "none", quantization__method="none") == pytest.approx(
        chosen, rel=0.02
    )
    assert read_record(tmp_path / "auto").setting("quantization.method") == "none"
