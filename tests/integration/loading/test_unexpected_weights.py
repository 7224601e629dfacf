"""Tensors of a checkpoint that the model has no place for: some kinds are passed over, all others are refused.

Tensors that are passed over change no logits, and a merge copies them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.pickles import header_of
from qlora_cli.model_files.unexpected_weights import may_be_ignored, prediction_layers
from qlora_cli.quantization.storage_plan import build_on_meta
from tests.support.models.loading import copy_tokenizer, load, logits, refused, save_model
from tests.support.models.reference_models import IDS
from tests.support.models.tiny_models import FAMILIES, tiny_config, tiny_model
from tests.support.runs.merging import merge, on_plain, save, stored
from tests.support.runs.merging import refused as merge_refused

Tensors = Mapping[str, torch.Tensor]

TRIANGLE = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
MASKS: Mapping[str, tuple[str, Tensors]] = {
    "gpt2": ("transformer.h.{}.attn.", {"bias": TRIANGLE, "masked_bias": torch.tensor(-1e4)}),
    "gptj": ("transformer.h.{}.attn.", {"bias": TRIANGLE.to(torch.uint8), "masked_bias": torch.tensor(-1e9)}),
    "gpt_neo": ("transformer.h.{}.attn.attention.", {"bias": TRIANGLE, "masked_bias": torch.tensor(-1e9)}),
    "gpt_neox": ("gpt_neox.layers.{}.attention.", {"bias": TRIANGLE, "masked_bias": torch.tensor([-1e9])}),
    "codegen": ("transformer.h.{}.attn.", {"causal_mask": TRIANGLE}),
    "llama": (
        "model.layers.{}.self_attn.rotary_emb.",
        {"inv_freq": torch.ones(8), "cos_cached": torch.ones(1, 1, 128, 16)},
    ),
}


def of_each_layer(family: str) -> dict[str, torch.Tensor]:
    prefix, tensors = MASKS[family]
    return {f"{prefix.format(i)}{name}": value.clone() for i in range(2) for name, value in tensors.items()}


def save_codegen(directory: Path) -> Path:
    sizes = {"vocab_size": 3072, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("codegen", **sizes), dtype=torch.float32)
    model.save_pretrained(directory)
    return copy_tokenizer(directory)


def add(directory: Path, tensors: Tensors) -> None:
    file = directory / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def as_pickle(directory: Path) -> None:
    file = directory / "model.safetensors"
    torch.save(load_file(file), directory / "pytorch_model.bin")
    file.unlink()


@pytest.mark.parametrize("is_pickle", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("family", MASKS)
def test_stored_masks_and_rotary_caches_are_passed_over(family: str, is_pickle: bool, tmp_path: Path) -> None:
    model = save_codegen(tmp_path) if family == "codegen" else save_model(tmp_path, family)
    before = logits(load(model, quantization__method="none").base)
    add(model, of_each_layer(family))
    if is_pickle:
        as_pickle(model)
    after = load(model, quantization__method="none", model__allow_pickle=is_pickle)
    assert torch.equal(logits(after.base), before)


def own_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the buffers that a model computes itself and does not store."""
    stored_names = model.state_dict().keys()
    return {name: value for name, value in model.named_buffers() if name not in stored_names}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_computed_buffer_may_be_stored_too_with_or_without_the_prefix_of_the_base(
    family: str,
) -> None:
    model = build_on_meta(tiny_config(family), torch.float32)
    base = ModelConfig(config=model.config, key_mapping=None)
    for name, value in own_buffers(model).items():
        for called in (name, name.removeprefix(f"{model.base_model_prefix}.")):
            assert may_be_ignored(model, base, called, header_of(called, value, "file"), ()), called


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_of_any_model_would_be_passed_over_under_another_layer(family: str) -> None:
    """An extra layer, or a weight of another name, stays an error whatever its shape."""
    model = build_on_meta(tiny_config(family), torch.float32)
    base = ModelConfig(config=model.config, key_mapping=None)
    ignored = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = None  # those are the patterns of transformers itself
    for name, value in model.named_parameters():
        for called in (name.replace(".1.", ".7."), f"{name}_extra"):
            if called != name:
                assert not may_be_ignored(model, base, called, header_of(called, value, "file"), ()), (
                    called,
                    ignored,
                )


def test_stored_buffers_of_the_model_change_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path, "gptj")
    before = logits(load(model, quantization__method="none").base)
    add(
        model,
        {name: torch.zeros_like(value) for name, value in own_buffers(tiny_model("gptj", vocab_size=3072)).items()},
    )
    assert torch.equal(logits(load(model, quantization__method="none").base), before)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_layers_are_not_loaded_with_a_note(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, family, num_nextn_predict_layers=1)
    before = logits(load(model, quantization__method="none").base)
    layer = {
        name.replace(".layers.1.", ".layers.2."): value.clone()
        for name, value in load_file(model / "model.safetensors").items()
        if ".layers.1." in name
    }
    add(
        model,
        {
            **layer,
            "model.layers.2.eh_proj.weight": torch.zeros(64, 128),
            "model.layers.2.enorm.weight": torch.ones(64),
        },
    )
    loaded = load(model, quantization__method="none")
    assert torch.equal(logits(loaded.base), before)
    (note,) = [note for note in loaded.notes if "layer 2 of the checkpoint predicts tokens further ahead" in note]
    assert "num_hidden_layers" not in note
    assert any("layer 2" in note for note in loaded.report().notes)


LAYER_OF_ANY = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


@pytest.mark.parametrize(
    ("number", "layers"), [(1, {2}), (2, {2, 3}), (0, set()), (-1, set()), ("a", set()), (None, set()), (True, set())]
)
def test_layers_after_the_last_are_prediction_layers_as_far_as_the_config_counts_them(
    number: object, layers: set[int]
) -> None:
    config = tiny_config("llama")  # of two layers
    setattr(config, "num_nextn_predict_layers", number)  # noqa: B010 - llama has none
    plain = [f"model.layers.{layer}.{name}" for layer in range(6) for name in LAYER_OF_ANY]
    assert prediction_layers(config, plain) == layers
    tower = [f"vision_tower.encoder.layers.{layer}.mlp.fc1.weight" for layer in range(6)]
    assert prediction_layers(config, [*plain[:6], *tower]) == frozenset()


def test_a_plain_layer_after_the_last_passes_with_a_note_if_the_config_counts_it(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "base")
    adapted = on_plain(model, LoraConfig(r=2, target_modules=["o_proj"]))
    adapter = save(adapted, tmp_path / "adapter")
    expected, before = logits(adapted, IDS), logits(load(model, quantization__method="none").base)
    config, held = model / "config.json", load_file(model / "model.safetensors")
    layer = {name.replace(".1.", ".2."): value.clone() for name, value in held.items() if ".layers.1." in name}
    assert layer
    add(model, layer)
    assert "model.layers.2." in refused(model, ModelError)
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    loaded = load(model, quantization__method="none")
    assert torch.equal(logits(loaded.base), before)
    (note,) = [note for note in loaded.notes if "layer 2" in note]
    assert (
        "not loaded, and not trained. Without an eh_proj it may be an ordinary layer: is num_hidden_layers, 2, right?"
        in note
    )
    merged = merge(adapter, output=tmp_path / "merged", dtype="fp32")
    written = stored(merged.directory)
    assert all(torch.equal(written[name].to(value.dtype), value) for name, value in layer.items())
    assert torch.allclose(logits(load(merged.directory, quantization__method="none").base, IDS), expected, atol=1e-4)


@pytest.mark.parametrize("number", [0, "a"])
def test_a_real_layer_that_the_config_does_not_count_is_refused(number: object, tmp_path: Path) -> None:
    model = save_model(tmp_path / "base")
    adapter = save(
        on_plain(model, LoraConfig(r=2, target_modules=["o_proj"], layers_to_transform=[0])), tmp_path / "a"
    )
    config = model / "config.json"
    changes = {"num_hidden_layers": 1, "num_nextn_predict_layers": number}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    for message in (refused(model, ModelError), merge_refused(adapter)):
        assert "model.layers.1." in message
        assert "num_hidden_layers is 1 in config.json, and the weights have layers up to number 1" in message


@pytest.mark.parametrize(
    ("family", "changes", "name", "tensor"),
    [
        ("llama", {}, "model.layers.2.mlp.up_proj.weight", torch.zeros(128, 64)),
        ("glm4_moe", {"num_nextn_predict_layers": 1}, "model.layers.3.mlp.up_proj.weight", torch.zeros(128, 64)),
        ("gptj", {}, "transformer.h.0.attn.bias", torch.zeros(64)),
        ("gptj", {}, "transformer.h.0.attn.masked_bias", torch.zeros(64)),
        ("gptj", {}, "transformer.h.0.attn.c_extra.bias", TRIANGLE),
        ("llama", {}, "model.rotary_emb.scale", torch.zeros(8)),
        ("llama", {}, "model.position_ids", torch.zeros(128)),
    ],
)
def test_any_other_tensor_is_refused_by_the_loader_and_by_a_merge(
    family: str, changes: dict[str, Any], name: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "base", family, **changes)
    target = "out_proj" if family == "gptj" else "o_proj"
    adapter = save(on_plain(model, LoraConfig(r=2, target_modules=[target])), tmp_path / "adapter")
    add(model, {name: tensor.clone()})
    assert name in refused(model, ModelError)
    assert name in merge_refused(adapter)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_merge_copies_what_the_loader_passes_over(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "base", family)
    target = {"gpt2": "c_attn", "gpt_neox": "dense"}.get(family, "o_proj")
    adapted = on_plain(model, LoraConfig(r=2, target_modules=[target]))
    adapter = save(adapted, tmp_path / "adapter")
    expected = logits(adapted, IDS)
    extra = of_each_layer(family)
    add(model, extra)
    merged = merge(adapter, output=tmp_path / "merged", dtype="fp32")
    written = stored(merged.directory)
    for name, value in extra.items():
        assert torch.equal(written[name].to(value.dtype), value), name
    assert torch.allclose(logits(load(merged.directory, quantization__method="none").base, IDS), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "model.layers.2.mlp.up_proj.weight",
            "num_hidden_layers is 2 in config.json, and the weights have layers",
        ),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "They belong to an adapter"),
        ("model.extra.weight", "Is config.json of another model or version?"),
    ],
)
def test_the_hint_follows_from_the_unexpected_tensors(name: str, hint: str, tmp_path: Path) -> None:
    model = save_model(tmp_path)
    add(model, {name: torch.zeros(2, 2)})
    assert hint in refused(model, ModelError)
