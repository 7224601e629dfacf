"""Anyone's adapter loads as in plain PEFT, can be disabled, continues to train, and is written back as it was read."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from qlora_cli.adapters.base_parameters import SwitchedParameters, switched_parameters_in
from qlora_cli.adapters.state import adapter_state, restore_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError, TrainingError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.training.checks.adapter_check import check_saved
from tests.support.models.loading import asked_load, logits, refused, save_model
from tests.support.models.reference_models import ROWS, load_plain
from tests.support.models.vision_language import load_full, save_full
from tests.support.runs.merging import adapted, change_adapter, changed_copy, merge, on_plain, save
from tests.support.runs.merging import plain_logits as logits_of_merged

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]
GROWN = ROWS + 3
KEPT_CONFIG = {"exclude_modules": ["o_proj"], "unsloth_version": "2025.1", "layers_pattern": None}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases."""
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", vocab_size=ROWS)


def config_of(**values: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **values}
    )


def ours(adapter: Path, *, trains: bool = False, **flags: object) -> LoadedModel:
    """Load an adapter on its base in fp32, unquantized, as commands do."""
    settings = asked_load(adapter, **{"quantization__method": "none", **flags})
    silent = SilentReporter()
    return load_planned(plan_load(settings, silent), silent, trains_adapter=trains)


def model_of(loaded: LoadedModel) -> PeftModel:
    assert isinstance(loaded.model, PeftModel)
    return loaded.model


def by_peft(checkpoint: Path, adapter: Path, rows: int | None = None) -> torch.Tensor:
    """Return the logits of plain PEFT."""
    base = load_plain(checkpoint)
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keys that it does not know
        return logits(PeftModel.from_pretrained(base, adapter))


# ---- keys

PEFT_BASE = "base_model.model."
KEYS: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "with another name": lambda key: key.replace(".weight", ".my-adapter_2.weight"),
    "of a compiled model": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "of a distributed model": lambda key: f"module.{key}",
    "of a sharded model": lambda key: f"_fsdp_wrapped_module.{key.replace('.mlp.', '._fsdp_wrapped_module.mlp.')}",
    "with checkpointing": lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "of a model without PEFT's place": lambda key: key.removeprefix(PEFT_BASE),
    "of the decoder inside": lambda key: key.removeprefix(f"{PEFT_BASE}model."),
    "with PEFT's place twice": lambda key: f"{PEFT_BASE}{key}",
    "of a model with towers": lambda key: key.replace(PEFT_BASE, f"{PEFT_BASE}language_model."),
    "all at once": lambda key: f"module._orig_mod.{PEFT_BASE}{key.replace('.weight', '.default.weight')}",
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_other_tools_name_the_same_weights(llama: Path, adapter: Path, kind: str, tmp_path: Path) -> None:
    other = changed_copy(
        adapter, tmp_path / "other", lambda state: {KEYS[kind](key): value for key, value in state.items()}
    )
    assert load_file(other / ADAPTER_WEIGHTS).keys() != load_file(adapter / ADAPTER_WEIGHTS).keys()
    assert torch.equal(logits(ours(other).model), by_peft(llama, adapter))
    merged = merge(other, output=tmp_path / "merged", dtype="fp32")
    for name, value in merge(adapter, output=tmp_path / "plain", dtype="fp32").tensors.items():
        assert torch.equal(merged.tensors[name], value)


def test_foreign_keys_are_counted_and_described_by_their_prefix(adapter: Path, tmp_path: Path) -> None:
    def foreign(state: State) -> State:
        return {f"transformer.blocks.{index}.{key}": torch.zeros(1) for key in state for index in range(200)}

    message = refused(changed_copy(adapter, tmp_path / "other", foreign), ModelError)
    assert f"has {200 * 8} weights that don't fit the base" in message
    assert "they begin with transformer.blocks, and the base's with" in message
    assert len(message) < 900


def test_two_adapters_in_one_file_are_refused(adapter: Path, tmp_path: Path) -> None:
    def doubled(state: State) -> State:
        named = {key.replace(".weight", ".one.weight"): value for key, value in state.items()}
        return {**named, **{key.replace(".weight", ".two.weight"): value + 1 for key, value in state.items()}}

    other = changed_copy(adapter, tmp_path / "other", doubled)
    assert "holds more than one adapter: one, two" in refused(other, ModelError)


# ---- base weights in a file

HELD: dict[str, tuple[dict[str, Any], int | None, bool]] = {
    "embedding and head": ({}, None, True),
    "a grown vocabulary": ({}, GROWN, True),
    "grown to a multiple of 64": ({}, ROWS + 64, True),
    "grown, the ends trained whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, GROWN, False),
    "grown, rows trained": ({"trainable_token_indices": [5, ROWS + 1]}, GROWN, True),
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, None, True),
    "LoRA on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, None, True),
}


def written_with_ends(base: Path, place: Path, kind: str) -> tuple[Path, int | None]:
    """Return an adapter whose file holds an embedding or head unlike the base's, and the rows of its vocabulary."""
    values, rows, saves_ends = HELD[kind]
    model = load_plain(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(5)
    if saves_ends and "LoRA" not in kind:
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            assert isinstance(weight, torch.Tensor)
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    save(adapted(model, config_of(**values)), place, save_embedding_layers=saves_ends)
    file = place / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | KEPT_CONFIG))
    return place, rows


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("base", ["llama", "tied"])
def test_base_weights_in_a_file_are_used_only_with_the_adapter_and_are_written_back(
    base: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(base)
    adapter, rows = written_with_ends(checkpoint, tmp_path / "adapter", kind)
    wanted, of_base = by_peft(checkpoint, adapter, rows), logits(load_plain(checkpoint))
    model = model_of(ours(adapter))
    assert torch.equal(logits(model), wanted)
    with model.disable_adapter():
        without = logits(model)
        assert torch.equal(without[..., :ROWS], of_base)
        assert without[..., ROWS:].eq(-torch.inf).all()
    assert torch.equal(logits(model), wanted)
    merged = merge(adapter, output=tmp_path / "merged", dtype="fp32")
    torch.testing.assert_close(logits_of_merged(load_plain(merged.directory)), logits_of(model), rtol=1e-4, atol=1e-4)

    on = model_of(ours(adapter, trains=True))
    save_adapter(on, tmp_path / "on")
    before, after = load_file(adapter / ADAPTER_WEIGHTS), load_file(tmp_path / "on" / ADAPTER_WEIGHTS)
    assert after.keys() <= before.keys()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert torch.equal(by_peft(checkpoint, tmp_path / "on", rows), wanted)
    configs = [json.loads((place / ADAPTER_CONFIG).read_text()) for place in (adapter, tmp_path / "on")]
    assert configs[0] == configs[1]


def logits_of(model: PeftModel) -> torch.Tensor:
    return logits_of_merged(model)


def test_a_vocabulary_is_extended_with_a_note_even_without_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    adapter, _ = written_with_ends(llama, tmp_path / "adapter", "grown to a multiple of 64")
    loaded = ours(adapter)
    grown = f"the embedding was extended from {ROWS:,} to {ROWS + 64:,} rows"
    assert loaded.notes == (f"{grown}; without the adapter, no new token is predicted",)


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_base_weights_in_an_adapters_file_replace_those_of_the_base(
    llama: Path, adapter: Path, method: str, tmp_path: Path
) -> None:
    """A norm, and a linear layer that may be stored quantized."""
    names = ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight")
    values = {name: 0.5 + torch.rand(load_plain(llama).get_parameter(name).shape) for name in names}
    other = changed_copy(
        adapter,
        tmp_path / "other",
        lambda state: {**state, **{f"{PEFT_BASE}{name}": value for name, value in values.items()}},
    )
    merged = merge(other, output=tmp_path / "merged", dtype="fp32")
    assert all(torch.equal(merged.tensors[name], value) for name, value in values.items())
    model = model_of(ours(other, quantization__method=method))
    assert isinstance(switched_parameters_in(model), SwitchedParameters)
    parameters = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in values.items())
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(without, logits(ours(llama, quantization__method=method).model))
    assert not torch.equal(logits(model), without)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_trained_biases_are_switched_and_continue_to_train(
    qwen2: Path, bias: str, method: str, tmp_path: Path
) -> None:
    adapter = save(on_plain(qwen2, config_of(bias=bias)), tmp_path / "adapter")
    stored = load_file(adapter / ADAPTER_WEIGHTS)
    model = model_of(ours(adapter, quantization__method=method))
    if method == "none":
        assert torch.equal(logits(model), by_peft(qwen2, adapter))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(ours(qwen2, quantization__method=method).model))
    on = model_of(ours(adapter, trains=True, quantization__method=method))
    trained = [parameter for parameter in on.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == sum(value.numel() for value in stored.values())
    for parameter in trained:
        parameter.data += 0.25
    save_adapter(on, tmp_path / "on")
    after = load_file(tmp_path / "on" / ADAPTER_WEIGHTS)
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[key], value + 0.25) for key, value in stored.items())
    again = model_of(ours(tmp_path / "on", quantization__method=method))
    assert torch.equal(logits(again), logits(on))


def test_a_checkpoint_restores_the_base_weights_that_it_holds(llama: Path, tmp_path: Path) -> None:
    adapter, _ = written_with_ends(llama, tmp_path / "adapter", "embedding and head")
    model = model_of(ours(adapter, trains=True))
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    save_adapter(model, tmp_path / "checkpoint")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    restore_adapter(model, tmp_path / "checkpoint")
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(model).items())


# ---- the check at the end


@pytest.mark.parametrize("kind", ["embedding and head", "a grown vocabulary", "grown, rows trained"])
def test_an_embedding_or_head_lost_on_writing_is_found(llama: Path, kind: str, tmp_path: Path) -> None:
    adapter, _ = written_with_ends(llama, tmp_path / "adapter", kind)
    loaded = ours(adapter, trains=True)
    model = model_of(loaded)
    save_adapter(model, tmp_path / "on")
    before = logits(model)
    check_saved(model, tmp_path / "on", loaded)
    assert torch.equal(logits(model), before)
    change_adapter(tmp_path / "on", lambda state: {key: value for key, value in state.items() if "lm_head" not in key})
    with pytest.raises(TrainingError, match=r"does not hold what was trained: lm_head\.weight is missing"):
        check_saved(model, tmp_path / "on", loaded)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_a_base_that_an_adapter_has_changed_is_found(adapter: Path, name: str, tmp_path: Path) -> None:
    loaded = ours(adapter, trains=True)
    save_adapter(model_of(loaded), tmp_path / "on")
    check_saved(model_of(loaded), tmp_path / "on", loaded)
    loaded.base.get_parameter(name).data[7] += 1
    with pytest.raises(TrainingError, match=f"{re.escape(name)} of the base is not that of model.safetensors"):
        check_saved(model_of(loaded), tmp_path / "on", loaded)


def test_another_scale_in_the_written_config_is_found(adapter: Path, tmp_path: Path) -> None:
    loaded = ours(adapter, trains=True)
    save_adapter(model_of(loaded), tmp_path / "on")
    file = tmp_path / "on" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 9}))
    with pytest.raises(TrainingError, match="its config gives another scale to"):
        check_saved(model_of(loaded), tmp_path / "on", loaded)


# ---- models with towers

ON_TOWERS: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": ["q_proj", "down_proj"]},
    "a pattern": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "full names": {
        "target_modules": [
            "model.language_model.layers.0.self_attn.q_proj",
            "model.language_model.layers.1.mlp.down_proj",
        ]
    },
    "ends of names": {"target_modules": ["language_model.layers.1.self_attn.v_proj"]},
    "patterns of rank and alpha": {
        "rank_pattern": {"language_model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r".*language_model\.layers\.1.*": 32},
        "exclude_modules": r".*vision.*",
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "language_model.layers"},
    "modules trained whole": {
        "target_modules": r".*language_model.*q_proj",
        "modules_to_save": ["language_model.norm"],
    },
}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_full(tmp_path_factory.mktemp("gemma3") / "base", "gemma3")


@pytest.mark.parametrize("kind", ON_TOWERS)
def test_targets_on_the_whole_model_are_those_of_its_decoder_and_are_written_back_unchanged(
    gemma3: Path, kind: str, tmp_path: Path
) -> None:
    config = config_of(base_model_name_or_path=str(gemma3), **ON_TOWERS[kind])
    whole = adapted(load_full(gemma3, "gemma3"), config)
    for name, parameter in whole.named_parameters():
        if "vision" in name and "lora_B" in name:
            parameter.data.zero_()
    place = save(whole, tmp_path / "adapter")
    wanted = logits(whole)
    assert torch.equal(logits(ours(place).model), wanted)
    on = model_of(ours(place, trains=True))
    save_adapter(on, tmp_path / "on")
    assert torch.equal(logits(ours(tmp_path / "on").model), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about towers, on which a list of names has adapters without an effect
        theirs = PeftModel.from_pretrained(load_full(gemma3, "gemma3"), tmp_path / "on")
    assert torch.equal(logits(theirs), wanted)
    restore_adapter(on, tmp_path / "on")
    configs = [json.loads((one / ADAPTER_CONFIG).read_text()) for one in (place, tmp_path / "on")]
    assert configs[0] == configs[1]
