"""Adapters and bases as other tools write them, several adapters at once, and adapters that can't be merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.model_files.model_config import TOWERS
from tests.support.models.loading import copy_tokenizer, save_model
from tests.support.models.reference_models import ROWS, load_plain
from tests.support.models.vision_language import load_full, save_full
from tests.support.runs.merging import (
    adapted,
    assert_same,
    change_adapter,
    loaded_plain,
    merge,
    merged_by_hand,
    on_plain,
    plain_logits,
    refused,
    save,
    stored,
    streamed_logits,
    verified,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), vocab_size=ROWS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), vocab_size=ROWS, tie_word_embeddings=True)


def config_of(**values: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **values}
    )


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter, which no test changes."""
    return save(on_plain(llama, config_of()), tmp_path_factory.mktemp("adapter"))


def copy_of(adapter: Path, place: Path) -> Path:
    shutil.copytree(adapter, place)
    return place


def change_config(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / ADAPTER_CONFIG
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


# ---- as other tools write them

AS_FIRST = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "task_type"}
CONFIGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "keys that this PEFT does not know": lambda config: {
        **config,
        **{"unsloth_fixed": True, "unsloth_version": "2025.1", "use_gradient_checkpointing": "unsloth"},
        **{"enable_lora": None, "merge_weights": False, "auto_mapping": None, "of_a_later_version": {"a": 1}},
    },
    "only the keys of the first PEFT": lambda config: {
        **{key: value for key, value in config.items() if key in AS_FIRST},
        **{"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None},
    },
    "a revision of its base": lambda config: {**config, "revision": "main"},
    "dropout": lambda config: {**config, "lora_dropout": 0.3},
    "a beginning by EVA": lambda config: {**config, "init_lora_weights": "eva"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_keys_of_a_config_change_nothing(llama: Path, adapter: Path, kind: str, tmp_path: Path) -> None:
    other = copy_of(adapter, tmp_path / "adapter")
    change_config(other, CONFIGS[kind])
    merged = merge(other, output=tmp_path / "merged")
    assert_same(merged.tensors, merge(adapter, output=tmp_path / "plain").tensors)
    assert torch.equal(
        streamed_logits(merged, with_adapters=True),
        plain_logits(PeftModel.from_pretrained(load_plain(llama), adapter)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_16_bit_are_multiplied_in_fp32(llama: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = on_plain(llama, config_of())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()
    place = save(model, tmp_path / "adapter")
    change_adapter(place, lambda state: {key: value.to(dtype) for key, value in state.items()})
    merged = merge(place, output=tmp_path / "merged")
    assert_same(merged.tensors, merged_by_hand(model, load_plain(llama), torch.bfloat16, tmp_path / "by-hand"))


def test_a_pickle_is_the_same(adapter: Path, tmp_path: Path) -> None:
    other = copy_of(adapter, tmp_path / "adapter")
    torch.save(load_file(other / ADAPTER_WEIGHTS), other / "adapter_model.bin")
    (other / ADAPTER_WEIGHTS).unlink()
    assert "--allow-pickle" in refused(other)
    merged = merge(other, output=tmp_path / "merged", allow_pickle=True)
    assert_same(merged.tensors, merge(adapter, output=tmp_path / "plain").tensors)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
@pytest.mark.parametrize("base", ["llama", "tied"])
def test_a_saved_embedding_equal_to_that_of_the_base_changes_nothing(
    base: str, targets: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(base)
    model = on_plain(checkpoint, config_of(target_modules=targets))
    alone = save(model, tmp_path / "alone", save_embedding_layers=False)
    with_embedding = save(model, tmp_path / "with-embedding", save_embedding_layers=True)
    assert len(load_file(with_embedding / ADAPTER_WEIGHTS)) > len(load_file(alone / ADAPTER_WEIGHTS))
    one, other = (merge(place, output=tmp_path / f"{place.name}-merged") for place in (alone, with_embedding))
    assert_same(one.tensors, other.tensors)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, ROWS + 3]},
    ],
    ids=["saved only", "adapted", "rows"],
)
@pytest.mark.parametrize("base", ["llama", "tied"])
def test_a_vocabulary_that_was_grown_elsewhere_is_taken_as_it_was_saved(
    base: str, values: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Up to a multiple of 64, with the tool's random new rows, where ours would be the mean."""
    checkpoint: Path = request.getfixturevalue(base)
    grown = load_plain(checkpoint)
    grown.resize_token_embeddings(ROWS + 64)
    model = adapted(grown, config_of(**values))
    place = save(model, tmp_path / "adapter", save_embedding_layers=True)
    ids = torch.tensor([[20, ROWS, 21, ROWS + 3, 22]])
    exact = merge(place, output=tmp_path / "exact", dtype="fp32")
    loaded = loaded_plain(exact.directory)
    assert loaded.config.vocab_size == ROWS + 64
    torch.testing.assert_close(plain_logits(loaded, ids), plain_logits(model, ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        streamed_logits(exact, with_adapters=True, ids=ids), plain_logits(model, ids), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("family", "names"), [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))]
)
def test_adapters_on_experts_one_by_one_as_under_transformers_4(
    family: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", family, vocab_size=ROWS)
    before = stored(base)
    ends = tuple(f".{leaf}.weight" for leaf in names)
    keys = [name for name in before if name.endswith(ends)]
    assert len([key for key in keys if ".experts." in key]) == 2 * 4 * 3
    generator = torch.Generator().manual_seed(3)
    state: dict[str, torch.Tensor] = {}
    expected = dict(before)
    for key in keys:
        num_out, num_in = before[key].shape
        left, right = torch.randn(num_out, 4, generator=generator), torch.randn(4, num_in, generator=generator) * 0.05
        path = f"base_model.model.{key.removesuffix('.weight')}"
        state |= {f"{path}.lora_B.weight": left, f"{path}.lora_A.weight": right}
        expected[key] = (before[key].float() + left @ right * 2).bfloat16()
    place = tmp_path / "adapter"
    config_of(target_modules=list(names), base_model_name_or_path=str(base)).save_pretrained(place)
    save_file(state, place / ADAPTER_WEIGHTS)
    merged = merge(place, output=tmp_path / "merged").tensors
    assert merged.keys() == expected.keys()
    for name, value in expected.items():  # PEFT joins the two halves, whose products are sums with zeros then
        torch.testing.assert_close(merged[name], value, rtol=1e-2, atol=1e-6)
        assert (merged[name] == value).float().mean() > 0.999


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava", "mistral3"])
def test_an_adapter_on_a_model_with_towers_is_merged_if_it_leaves_them_alone(family: str, tmp_path: Path) -> None:
    base = save_full(tmp_path / "base", family)
    config = config_of(target_modules=["q_proj", "v_proj", "down_proj", "qkv"], base_model_name_or_path=str(base))
    model = adapted(load_full(base, family), config)
    towers = [parameter for name, parameter in model.named_parameters() if any(tower in name for tower in TOWERS)]
    on_towers = [parameter for parameter in towers if parameter.requires_grad]
    assert on_towers
    assert "changes more than the text decoder" in refused(save(model, tmp_path / "on-towers"))
    for name, parameter in model.named_parameters():
        if any(tower in name for tower in TOWERS) and "lora_B" in name:
            parameter.data.zero_()
    merged = merge(save(model, tmp_path / "adapter"), output=tmp_path / "merged", dtype="fp32")
    merged_logits = plain_logits(load_full(merged.directory, family))
    torch.testing.assert_close(merged_logits, plain_logits(model), rtol=1e-4, atol=1e-4)
    assert verified(merged).is_exact


def test_weights_outside_the_text_model_are_compared_too(tmp_path: Path) -> None:
    base = save_full(tmp_path / "base", "gemma3")
    config = config_of(target_modules=["down_proj"], base_model_name_or_path=str(base))
    merged = merge(save(adapted(load_full(base, "gemma3"), config), tmp_path / "adapter"), output=tmp_path / "merged")
    assert verified(merged).differing_parameters == ()
    name = next(tensor.name for tensor in merged.plan.tensors if tensor.group is None)
    (file,) = merged.directory.glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].neg()}, file)  # also of a zero
    assert verified(merged).differing_parameters == (name,)
    del tensors[name]
    save_file({**tensors, "one.too.many": torch.zeros(1)}, file)
    assert not verified(merged).is_exact
    assert set(verified(merged).differing_parameters) == {"one.too.many", name}


# ---- several


def test_several_adapters_are_added_by_their_weights(llama: Path, adapter: Path, tmp_path: Path) -> None:
    model = on_plain(llama, config_of(target_modules=["q_proj", "v_proj"], lora_alpha=2))
    other = save(model, tmp_path / "other")
    exact = merge(adapter, other, output=tmp_path / "merged", weights=(0.25, -1.5), dtype="fp32")
    expected = {name: value.float() for name, value in stored(llama).items()}
    for place, factor in ((adapter, 0.25 * 2), (other, -1.5 * 0.5)):
        state = load_file(place / ADAPTER_WEIGHTS)
        for key in [key for key in state if "lora_B" in key]:
            name = key.removeprefix("base_model.model.").replace("lora_B.", "")
            expected[name] += factor * (state[key] @ state[key.replace("lora_B", "lora_A")])
    for name, value in exact.tensors.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_the_same_twice_at_half_is_the_same(adapter: Path, tmp_path: Path) -> None:
    halves = merge(adapter, adapter, output=tmp_path / "halves", weights=(0.5, 0.5))
    assert_same(halves.tensors, merge(adapter, output=tmp_path / "whole").tensors)


def test_modules_trained_whole_can_not_be_weighted(llama: Path, adapter: Path, tmp_path: Path) -> None:
    whole = save(on_plain(llama, config_of(modules_to_save=["lm_head"])), tmp_path / "whole")
    assert "was trained whole" in refused(whole, weights=(0.5,))
    assert "was trained whole" in refused(whole, whole)
    merged = merge(adapter, whole, output=tmp_path / "merged").tensors  # the head of one, the layers of both
    assert torch.equal(
        merged["lm_head.weight"], load_file(whole / ADAPTER_WEIGHTS)["base_model.model.lm_head.weight"].bfloat16()
    )


# ---- bases in other files


@pytest.mark.parametrize("how", ["shards", "pickle"])
def test_a_base_in_several_files_or_pickled_gives_the_same(
    llama: Path, adapter: Path, how: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model = load_plain(llama, torch.bfloat16)
    model.save_pretrained(base, max_shard_size="200KB" if how == "shards" else "5GB")
    if how == "pickle":
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    copy_tokenizer(base)
    merged = merge(adapter, output=tmp_path / "merged", base_model=str(base), allow_pickle=how == "pickle")
    assert_same(merged.tensors, merge(adapter, output=tmp_path / "plain").tensors)
    loaded_plain(merged.directory)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in merged.directory.glob("*.safetensors")) == (files or ["model.safetensors"])


def test_an_adapter_without_an_effect_changes_no_bit_even_of_negative_zeros(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    base = copy_of(llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for value in tensors.values():
        value.view(-1)[:8] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "made_by": "somebody"})
    zero = copy_of(adapter, tmp_path / "zero")
    change_adapter(zero, lambda state: {key: value * ("lora_A" in key) for key, value in state.items()})
    merged = merge(zero, output=tmp_path / "merged", base_model=str(base))
    assert (merged.directory / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_merging_again_gives_the_same_bytes(adapter: Path, tmp_path: Path) -> None:
    one, other = (merge(adapter, output=tmp_path / name).directory for name in ("one", "other"))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


# ---- refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "it was initialized by pissa_niter_4, which changed its base"),
    # PEFT replaces the weights of the base by those that it has quantized.
    "LoftQ": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "it was initialized by loftq, which changed its",
    ),
    "OLoRA": ({"init_lora_weights": "olora"}, "it was initialized by olora, which changed its base"),
    "rank 0": ({"r": 0}, "r is 0, and should be greater than 0"),
    "another rank": ({"r": 5}, ", and the base needs (5, "),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "active from its invocation tokens on only"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "it repeats layers of its base"),
    "VeLoRA": ({"velora_config": {"num_groups": 4}}, "it is a variant of LoRA (velora_config)"),
    "KaSA": ({"kasa_config": {}}, "it is a variant of LoRA (kasa_config)"),
    "more targets": ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "lacks 4 of its weights"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "has 4 weights that don't fit the base"),
    "another base": ({"target_modules": ["query_key_value"]}, "can't be attached to its base"),
    "a broken config": ({"target_modules": 5}, "target_modules is 5, and should be"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_can_not_be_merged_exactly_is_refused_with_the_reason(
    adapter: Path, kind: str, tmp_path: Path
) -> None:
    other = copy_of(adapter, tmp_path / "adapter")
    values, reason = REFUSED[kind]
    change_config(other, lambda config: {**config, **values})
    assert reason in refused(other)


def test_loha_is_refused(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_plain(llama), LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "is LOHA, not LoRA" in refused(save(model, tmp_path / "adapter"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(adapter: Path, value: float, tmp_path: Path) -> None:
    other = copy_of(adapter, tmp_path / "adapter")

    def damaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(iter(state.values())).view(-1)[3] = value
        return state

    change_adapter(other, damaged)
    assert "holds NaN or infinite values" in refused(other)


def test_a_vocabulary_that_grew_with_modules_that_train_whole_is_merged_as_peft_saves_it_by_default(
    llama: Path, tmp_path: Path
) -> None:
    """PEFT writes such a module three times: as trained, again under another name, and as in the base."""
    model = load_plain(llama)
    model.resize_token_embeddings(ROWS + 64, mean_resizing=False)
    tuned = adapted(model, config_of(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    place = save(tuned, tmp_path / "adapter")
    assert any(".original_module." in key for key in load_file(place / ADAPTER_WEIGHTS))
    merged = merge(place, output=tmp_path / "merged", dtype="fp32")
    again = loaded_plain(merged.directory)
    assert merged.tensors["model.embed_tokens.weight"].shape[0] == ROWS + 64
    torch.testing.assert_close(plain_logits(again), plain_logits(tuned), atol=1e-5, rtol=1e-5)


def test_rotary_caches_of_older_checkpoints_are_passed_over(llama: Path, tmp_path: Path) -> None:
    base = copy_of(llama, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    cache = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**state, cache: torch.arange(8.0)}, base / "model.safetensors", metadata={"format": "pt"})
    place = save(on_plain(base, config_of()), tmp_path / "adapter")
    merged = merge(place, output=tmp_path / "merged")
    assert torch.equal(merged.tensors[cache], torch.arange(8.0))
