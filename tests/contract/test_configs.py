"""Every shipped settings file parses by the code that reads a user's."""

from pathlib import Path

import pytest

from qlora_cli.demo.run import DEMO_SETTINGS
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, resolve

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LEFT_TO_THE_USER = {"data.dataset": ("--dataset", "train.jsonl"), "output.directory": ("--output", "run")}


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_parses(path: Path) -> None:
    assert resolve(Sources(config=path, flags=LEFT_TO_THE_USER), TrainSettings).settings.model.name


def test_the_demo_config_says_what_the_demo_runs() -> None:
    output = {"output.directory": ("--output", "run")}
    settings = resolve(Sources(config=ROOT / "configs" / "demo.yaml", flags=output), TrainSettings).settings
    for path, value in DEMO_SETTINGS.items():
        section, key = path.split(".")
        assert getattr(getattr(settings, section), key) == value
    assert settings.data.eval_dataset is not None
    for name in (settings.model.name, *settings.data.dataset, *settings.data.eval_dataset):
        assert (ROOT / name).exists()
