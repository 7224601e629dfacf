"""Models and an adapter that the tests of this folder share and that none of them changes."""

from pathlib import Path

import pytest
from peft import LoraConfig

from tests.support.models.loading import save_model
from tests.support.models.reference_models import ROWS
from tests.support.runs.merging import on_plain, save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), vocab_size=ROWS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), vocab_size=ROWS, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter on `llama`, written by PEFT."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return save(on_plain(llama, config), tmp_path_factory.mktemp("adapter"))
