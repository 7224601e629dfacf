"""Every preset fits on its card: the table is what is predicted, and each file has what its line of it says."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qlora_cli.errors import UsageError
from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import facts_of_catalogue
from qlora_cli.settings.files.preset_files import Preset, preset_file, presets
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, resolve

SCRIPTS = Path(__file__).parents[3] / "scripts"
LEFT_TO_THE_USER = {"data.dataset": ("--dataset", "train.jsonl"), "output.directory": ("--output", "run")}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """`scripts/make_presets.py`, imported."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("make_presets")
    sys.path.remove(str(SCRIPTS))


def test_the_table_has_every_file_and_many_models_on_many_cards() -> None:
    names = [preset.name for preset in presets()]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(path.stem for path in preset_file(names[0]).parent.glob("*.yaml"))
    assert len({preset.model for preset in presets()}) >= 15
    assert {preset.card_gb for preset in presets()} == {8, 12, 16, 24, 48, 80}


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_a_preset_is_what_its_line_says_and_fits_on_every_card_of_its_size(preset: Preset) -> None:
    sources = Sources(preset=preset_file(preset.name), flags=LEFT_TO_THE_USER)
    settings = resolve(sources, TrainSettings).settings
    assert (settings.model.name, settings.data.max_length) == (preset.model, preset.max_length_tokens)
    assert (settings.lora.rank, settings.lora.alpha) == (16, 32)
    model = find_in_catalogue(preset.model)
    assert model is not None
    assert preset.name == f"{model.name}-{preset.card_gb}gb"
    assert preset.usable_bytes == find_gpu(f"{preset.card_gb}GB").usable_bytes
    assert preset.predicted_bytes <= preset.usable_bytes


@pytest.mark.parametrize("name", ["llama-3.2-1b-8gb", "smollm3-3b-8gb"])  # a quick one of two families
def test_the_table_is_what_is_predicted(script: ModuleType, name: str) -> None:
    preset = next(preset for preset in presets() if preset.name == name)
    model = find_in_catalogue(preset.model)
    assert model is not None
    estimator = Estimator(facts_of_catalogue(model))
    fit = script.fit_of(estimator, model, preset.max_length_tokens, preset.card_gb)
    assert (fit.fits, fit.process_high_bytes) == ("yes", preset.predicted_bytes), "run: python scripts/make_presets.py"


def test_flags_and_a_file_override_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lora: {rank: 8}\ndata: {max_length: 256}\n")
    flags = {**LEFT_TO_THE_USER, "data.max_length": ("--max-length", "128")}
    sources = Sources(preset=preset_file("qwen3-8b-24gb"), config=file, flags=flags)
    settings = resolve(sources, TrainSettings).settings
    assert (settings.model.name, settings.lora.alpha) == ("Qwen/Qwen3-8B", 32)
    assert (settings.lora.rank, settings.data.max_length) == (8, 128)


def test_a_name_that_is_not_a_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="there is no preset qwen3-8b-24") as raised:
        preset_file("qwen3-8b-24")
    assert "qwen3-8b-24gb" in str(raised.value.hint)
