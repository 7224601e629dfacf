"""Every shipped settings file parses by the code that reads a user's."""

from pathlib import Path

import pytest

from qlora_cli.demo.demonstration import DEMO_SETTINGS
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, resolve

ROOT = Path(__file__).parent.parent.parent
PRESETS = sorted((ROOT / "qlora_cli" / "presets").glob("*.yaml"))
CONFIGS = [*sorted((ROOT / "configs").rglob("*.yaml")), *PRESETS]
LEFT_TO_THE_USER = {"data.dataset": ("--dataset", "train.jsonl"), "output.directory": ("--output", "run")}


def test_there_are_configs() -> None:
    assert len(CONFIGS) - len(PRESETS) >= 2
    assert len(PRESETS) >= 15


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_parses(path: Path) -> None:
    assert resolve(Sources(config=path, flags=LEFT_TO_THE_USER), TrainSettings).settings.model.name


def test_the_demo_config_is_what_the_demo_runs() -> None:
    output = {"output.directory": ("--output", "run")}
    settings = resolve(Sources(config=ROOT / "configs" / "demo.yaml", flags=output), TrainSettings).settings
    for path, value in DEMO_SETTINGS.items():
        section, key = path.split(".")
        assert getattr(getattr(settings, section), key) == value
    assert settings.data.eval_dataset is not None
    for name in (settings.model.name, *settings.data.dataset, *settings.data.eval_dataset):
        assert (ROOT / name).exists()


# arXiv 2305.14314, appendix B: what all sizes share, then learning rate, dropout and trained parameters of each.
PAPER = {
    "model.dtype": "bf16",
    "quantization.method": "nf4",
    "quantization.double_quant": True,
    "quantization.compute_dtype": "bf16",
    "lora.rank": 64,
    "lora.alpha": 16,
    "lora.target_modules": "all-linear",
    "training.schedule": "constant",
    "training.adam_beta2": 0.999,
    "training.max_grad_norm": 0.3,
    "training.optimizer": "paged_adamw_32bit",
    "training.gradient_checkpointing": "on",
}
PAPER_SIZES = {"7b": (2e-4, 0.1), "13b": (2e-4, 0.1), "33b": (1e-4, 0.05), "65b": (1e-4, 0.05)}


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_the_configs_of_the_paper_have_its_values(size: str) -> None:
    path = ROOT / "configs" / "paper" / f"llama-{size}.yaml"
    settings = resolve(Sources(config=path, flags=LEFT_TO_THE_USER), TrainSettings).settings
    for name, value in PAPER.items():
        section, key = name.split(".")
        assert getattr(getattr(settings, section), key) == value, name
    training = settings.training
    assert (training.learning_rate, settings.lora.dropout) == PAPER_SIZES[size]
    assert training.micro_batch_size * training.gradient_accumulation_steps == 16


def test_every_config_of_the_paper_is_in_the_test_above() -> None:
    sizes = {path.stem.removeprefix("llama-") for path in (ROOT / "configs" / "paper").iterdir()}
    assert sizes == set(PAPER_SIZES)
