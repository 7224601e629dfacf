"""The card of an adapter says what it belongs to, holds no path of the machine, and its code loads the adapter."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_cli.training.outcome.adapter_card import CARD, TrainedSteps, write_card
from qlora_cli.training.run_plan import PreparedRun, prepare_run
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, short_settings
from tests.support.models.loading import load, logits, save_model, without_repacking

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Path(f"{ASSETS / 'train.jsonl'}#40")
HUB_BASE, COMMIT = "meta-llama/Llama-3.1-8B", "0123456789abcdef0123456789abcdef01234567"
TRAINED = TrainedSteps(steps=3, num_steps=3, loss=2.5, eval_loss=float("nan"))


def trained(model: Path, output: Path, **flags: Any) -> Path:
    return train(short_settings(model, ROWS, output, **flags), Recorder()).adapter


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("moe") / "base", "qwen3_moe", max_position_embeddings=512)


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(code)


def metadata(card: str) -> dict[str, Any]:
    """Return the metadata as the hub's own library reads it."""
    data: Any = ModelCard(card).data
    read: dict[str, Any] = data.to_dict()
    return read


def run_code(card: str, base: Path, adapter: Path) -> PreTrainedModel:
    """Run the code of a card with the paths of the base and of the adapter in it, and return its model."""
    code = code_of(card).replace("path or name of this adapter", str(adapter))
    code = code.replace(f"'{base.name}'", repr(str(base)))
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - that the card's own code works is what is tested
    model: PreTrainedModel = names["model"]
    return model


@pytest.mark.parametrize(
    "flags",
    [{}, {"quantization.method": "int8"}, {"quantization.method": "none"}, {"model.new_tokens": "<a>,<b>"}],
    ids=str,
)
def test_its_code_loads_the_adapter_as_it_was_trained(
    shallow_base: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    adapter = trained(shallow_base, tmp_path / "run", **flags)
    card = (adapter / CARD).read_text(encoding="utf-8")
    ours = load(adapter.parent, **{key.replace(".", "__"): value for key, value in flags.items() if "method" in key})
    ids = torch.arange(3, 40)[None]
    theirs = without_repacking(run_code(card, shallow_base, adapter))
    torch.testing.assert_close(logits(theirs, ids), logits(ours.model, ids), rtol=1e-4, atol=1e-4)
    assert str(tmp_path) not in card
    assert str(shallow_base.parent) not in card
    assert str(ASSETS) not in card
    data = metadata(card)
    assert (data["library_name"], data.get("base_model")) == ("peft", None)
    assert "fingerprint" in card
    assert "| steps | 3, of" in card


def test_its_code_loads_the_adapter_on_experts_in_16_bit(moe: Path, tmp_path: Path) -> None:
    adapter = trained(moe, tmp_path / "run", lora__target_modules=["q_proj"], lora__target_parameters="all-experts")
    card = (adapter / CARD).read_text(encoding="utf-8")
    assert "qlora quantizes the experts, too" in card
    theirs = get_peft_model_state_dict(run_code(card, moe, adapter))
    saved = load_file(adapter / "adapter_model.safetensors")
    assert any(".experts." in name for name in saved)
    assert theirs.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(theirs[name].float(), tensor.float(), rtol=0, atol=0)


def test_quantized_experts_are_left_to_qlora(moe: Path, tmp_path: Path) -> None:
    flags = {"lora.target_modules": ["q_proj"], "training.calibrate": True, "training.calibration_tokens": 300}
    card = (trained(moe, tmp_path / "run", **flags) / CARD).read_text(encoding="utf-8")
    assert "plain transformers can't load" in card
    assert "```" not in card


def test_a_base_that_the_run_made_goes_with_it(shallow_base: Path, tmp_path: Path) -> None:
    flags = {"training.calibrate": True, "training.calibration_tokens": 300}
    adapter = trained(shallow_base, tmp_path / "run", **flags)
    card = (adapter / CARD).read_text(encoding="utf-8")
    assert f"A LoRA adapter for `{shallow_base.name}`" in card
    assert "in `base/` of its directory" in card
    ids = torch.arange(3, 40)[None]
    theirs = without_repacking(run_code(card, tmp_path / "run" / "base", adapter))
    torch.testing.assert_close(logits(theirs, ids), logits(load(tmp_path / "run").model, ids), rtol=1e-4, atol=1e-4)
    assert str(tmp_path) not in card


@pytest.fixture(scope="module")
def prepared(shallow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedRun:
    return prepare_run(short_settings(shallow_base, ROWS, tmp_path_factory.mktemp("card") / "run"), Recorder())


def card_of(prepared: PreparedRun, directory: Path) -> str:
    write_card(directory, prepared, TRAINED)
    return (directory / CARD).read_text(encoding="utf-8")


def test_a_base_of_the_hub_is_named_with_its_commit(prepared: PreparedRun, tmp_path: Path) -> None:
    source = replace(prepared.loaded.source, base_name=HUB_BASE, commit=COMMIT)
    card = card_of(replace(prepared, loaded=replace(prepared.loaded, source=source)), tmp_path)
    data = metadata(card)
    assert data["base_model"] == HUB_BASE
    assert f"base_model:adapter:{HUB_BASE}" in data["tags"]
    assert f"from_pretrained('{HUB_BASE}', revision='{COMMIT}', dtype=" in code_of(card)


@pytest.mark.parametrize("name", ["/home/me/secret/base", "../base", "C:\\models\\base", "a/b/c"])
def test_what_is_no_repository_is_never_the_base_of_the_hub(prepared: PreparedRun, tmp_path: Path, name: str) -> None:
    source = replace(prepared.loaded.source, base_name=name, commit=COMMIT)
    card = card_of(replace(prepared, loaded=replace(prepared.loaded, source=source)), tmp_path)
    assert "base_model" not in metadata(card)
    assert "secret" not in card


def test_names_of_data_do_not_break_out_of_the_table(prepared: PreparedRun, tmp_path: Path) -> None:
    report = replace(prepared.train_data.report, name="/home/me/rows.jsonl, a`|\n# b.jsonl")
    card = card_of(replace(prepared, train_data=replace(prepared.train_data, report=report)), tmp_path)
    (line,) = [line for line in card.splitlines() if line.startswith("| trained on")]
    assert "`rows.jsonl`, `a__" in line
    assert "/home/me" not in card
    assert "nan" not in card
