"""The text decoder alone of a model with other modalities: the same logits on text, without the towers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.errors import ModelError
from qlora_cli.settings.models import LoraSettings
from tests.support.models.loading import load, logits, refused
from tests.support.models.reference_models import IDS, round_trip_weights
from tests.support.models.vision_language import FULL_MODELS, load_full, rewrite, save_full

pytestmark = pytest.mark.usefixtures("one_thread")

# The class that is loaded, and what the note calls it.
DECODERS = {
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "gemma4": ("Gemma4ForCausalLM", "gemma4_text"),
    "qwen2_vl": ("Qwen2ForCausalLM", "qwen2"),
    "qwen2_5_vl": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3_vl": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3_vl_moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "qwen3_5": ("Qwen3_5ForCausalLM", "qwen3_5_text"),
    "mistral3": ("MistralForCausalLM", "mistral"),
    "llava": ("LlamaForCausalLM", "llama"),
    "llava_onevision": ("Qwen2ForCausalLM", "qwen2"),
    "internvl": ("Qwen2ForCausalLM", "qwen2"),
    "idefics3": ("LlamaForCausalLM", "llama"),
    "smolvlm": ("LlamaForCausalLM", "llama"),
    "llama4": ("Llama4ForCausalLM", "llama4_text"),
}
# The prefixes of decoder and head in checkpoints of different versions of transformers.
INNER = ("language_model.model.", "language_model.lm_head.")
OUTER = ("model.language_model.", "lm_head.")
BARE = ("model.", "lm_head.")
PLACES = [
    *((family, place) for family in ("gemma3", "mistral3", "llava", "internvl") for place in (INNER, OUTER)),
    *((family, place) for family in ("qwen2_vl", "qwen2_5_vl") for place in (BARE, OUTER)),
]


@pytest.fixture(scope="module", params=FULL_MODELS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_full(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def full(family: str, checkpoint: Path) -> PreTrainedModel:
    """The whole model by plain transformers, which no test changes."""
    return load_full(checkpoint, family)


def test_the_decoder_of_every_family_is_named_here() -> None:
    assert FULL_MODELS.keys() == DECODERS.keys()


def test_logits_on_text_are_those_of_the_whole_model(family: str, checkpoint: Path, full: PreTrainedModel) -> None:
    loaded = load(checkpoint, quantization__method="none")
    assert torch.equal(logits(loaded.base, IDS), logits(full, IDS))
    assert type(loaded.base).__name__ == DECODERS[family][0]
    assert not [name for name, _ in loaded.base.named_parameters() if re.search("vision|visual|projector", name)]
    assert loaded.inventory.num_parameters < full.num_parameters()


def test_the_note_says_which_decoder_is_loaded(family: str, checkpoint: Path) -> None:
    loaded = load(checkpoint)
    name = DECODERS[family][1]
    assert loaded.notes[0] == f"{family} takes more than text; only its text decoder ({name}) is loaded"
    assert loaded.notes == loaded.report().notes


def test_quantized_logits_are_those_of_the_whole_model_with_its_decoder_dequantized(
    family: str, checkpoint: Path, full: PreTrainedModel
) -> None:
    loaded = load(checkpoint)
    assert {e.name: e for e in loaded.layout.inventory.entries} == {e.name: e for e in loaded.inventory.entries}
    quantized = [entry.name for entry in loaded.inventory.entries if entry.is_quantized]
    assert quantized
    reference = load_full(checkpoint, family)
    by_end = {re.sub(r"^.*(language|text)_model\.(model\.)?", "", n): n for n, _ in reference.named_parameters()}
    round_trip_weights(reference, [by_end[name.removeprefix("model.")] for name in quantized])
    decoder_logits = logits(loaded.base, IDS)
    assert torch.equal(decoder_logits, logits(reference, IDS))
    assert not torch.equal(decoder_logits, logits(full, IDS))


def test_an_adapter_trains_on_the_decoder(checkpoint: Path) -> None:
    model, _ = attach_adapter(load(checkpoint).base, LoraSettings(rank=8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("written_by", "place"), PLACES)
def test_the_decoder_is_the_same_model_under_any_prefix(
    written_by: str, place: tuple[str, str], tmp_path: Path
) -> None:
    checkpoint = save_full(tmp_path, written_by)
    expected = logits(load(checkpoint).base, IDS)
    names: list[str] = []

    def moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for key, tensor in weights.items():
            is_tower = re.search("vis|projector|merger|image|mlp1", key)
            decoder = re.sub(r"^(language_model\.model|model\.language_model|model)\.", lambda _: place[0], key)
            name = key if is_tower else re.sub(r"^(language_model\.)?lm_head\.", lambda _: place[1], decoder)
            renamed[name] = tensor
            names.append(name)
        return renamed

    rewrite(checkpoint, moved)
    assert f"{place[0]}layers.0.mlp.up_proj.weight" in names
    assert torch.equal(logits(load(checkpoint).base, IDS), expected)


def test_a_weight_that_belongs_to_no_tower_is_an_error(family: str, tmp_path: Path) -> None:
    damaged = rewrite(save_full(tmp_path, family), lambda weights: {**weights, "model.extra.weight": torch.ones(2)})
    message = refused(damaged, ModelError)
    assert "holds weights that its config.json does not describe: model.extra.weight (in model.safetensors)" in message


def test_a_missing_weight_of_the_decoder_is_an_error(tmp_path: Path) -> None:
    key = "language_model.model.layers.1.mlp.up_proj.weight"

    def without(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert weights.pop(key) is not None
        return weights

    message = refused(rewrite(save_full(tmp_path, "gemma3"), without), ModelError)
    assert "model.layers.1.mlp.up_proj.weight missing" in message


LOAD_WITHOUT_IMAGE_LIBRARIES = """
import sys, importlib.abc

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("PIL", "torchvision"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from qlora_cli.loading.loader import load_model
from qlora_cli.settings.models import LoadSettings, ModelSettings
for name in sys.argv[1:]:
    loaded = load_model(LoadSettings(model=ModelSettings(name=name, dtype="fp32", device="cpu")))
    print(type(loaded.base).__name__)
assert not {"PIL", "torchvision"} & sys.modules.keys()
"""


def test_neither_pillow_nor_torchvision_is_needed(tmp_path: Path) -> None:
    names = ("gemma3", "qwen3_vl", "llama4")
    checkpoints = [str(save_full(tmp_path / name, name)) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_IMAGE_LIBRARIES, *checkpoints],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [DECODERS[name][0] for name in names]
