"""The bundled model with fewer layers: as real to a run as all of it, at a part of the time of each step."""

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.conftest import ASSETS

NUM_LAYERS = 2  # one more than one, so that whatever goes from layer to layer is there


def save_shallow(directory: Path) -> Path:
    """Write the first layers of the bundled model, its embedding and tokenizer to `directory`, and return that."""
    shutil.copytree(ASSETS / "base", directory)
    weights = load_file(directory / "model.safetensors")
    chosen = {name: weight for name, weight in weights.items() if _layer_of(name) < NUM_LAYERS}
    assert len(chosen) < len(weights)
    save_file(chosen, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] > NUM_LAYERS
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": NUM_LAYERS}), encoding="utf-8")
    return directory


def _layer_of(name: str) -> int:
    number = re.search(r"\.layers\.(\d+)\.", name)
    return -1 if number is None else int(number[1])
