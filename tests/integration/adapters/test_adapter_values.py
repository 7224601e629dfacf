"""Values, keys and config of an adapter or base that can't be used: each is named with its file, before it is used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from qlora_cli.loading.weight_reader import check_finite
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import read_checkpoint
from qlora_cli.model_files.model_config import read_config
from qlora_cli.model_files.source import find_model
from qlora_cli.settings.models import ModelSettings
from tests.support.models.loading import load, refused
from tests.support.models.reference_models import load_plain
from tests.support.runs.merging import changed_copy
from tests.support.runs.merging import refused as not_merged

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pickled", [False, True])
def test_nan_or_infinity_in_an_adapter_is_named(adapter: Path, value: float, pickled: bool, tmp_path: Path) -> None:
    def damaged(state: State) -> State:
        state[next(key for key in state if "lora_B" in key)][0, 0] = value
        return state

    other = changed_copy(adapter, tmp_path / "other", damaged)
    file = ADAPTER_WEIGHTS
    if pickled:
        file = "adapter_model.bin"
        torch.save(load_file(other / ADAPTER_WEIGHTS), other / file)
        (other / ADAPTER_WEIGHTS).unlink()
    message = refused(other, ModelError, model__allow_pickle=pickled)
    assert f"lora_B.weight in {file} holds NaN or infinite values" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_unsupported_dtype_of_an_adapter_is_named(
    adapter: Path, dtype: torch.dtype, pickled: bool, tmp_path: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    state = load_file(other / ADAPTER_WEIGHTS)
    key = next(key for key in state if "lora_B" in key)
    state[key] = state[key].to(dtype)
    (other / ADAPTER_WEIGHTS).unlink()
    file = other / ("adapter_model.bin" if pickled else ADAPTER_WEIGHTS)
    (torch.save if pickled else save_file)(state, file)
    message = refused(other, ModelError, model__allow_pickle=pickled)
    assert message.startswith(f"{file} can't be used: {key} is of dtype ")


@pytest.mark.parametrize("kind", ["adapter", "base"])
def test_keys_that_are_not_names_are_refused(llama: Path, adapter: Path, kind: str, tmp_path: Path) -> None:
    other = shutil.copytree({"adapter": adapter, "base": llama}[kind], tmp_path / "other")
    before, after = {
        "adapter": (ADAPTER_WEIGHTS, "adapter_model.bin"),
        "base": ("model.safetensors", "pytorch_model.bin"),
    }[kind]
    state: dict[object, torch.Tensor] = dict(load_file(other / before).items())
    state[5] = torch.ones(1)
    torch.save(state, other / after)
    (other / before).unlink()
    message = refused(other, ModelError, model__allow_pickle=True)
    assert f"{other / after} can't be read: its key 5 is not the name of a tensor" in message


BEYOND: dict[str, tuple[object, str]] = {
    "layer_replication": ([[0, 2], [1, 9]], "names 9, and the base has"),
    "trainable_token_indices": ([1, 10**6], "names 1000000, and the base has"),
    "rank_pattern": ({r"(a|a|.)*(.*)*(.+)+(.+)+X$": 4}, "takes more than"),
}


@pytest.mark.parametrize("key", BEYOND)
@pytest.mark.parametrize("merges", [False, True])
def test_names_in_a_config_that_match_nothing_are_reported_with_the_key(
    adapter: Path, key: str, merges: bool, tmp_path: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    file = other / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: BEYOND[key][0]}))
    message = not_merged(other) if merges else refused(other, ModelError)
    assert key in message
    if not (merges and key == "layer_replication"):  # an adapter with it can't be merged anyway
        assert str(file) in message
        assert BEYOND[key][1] in message


def test_modules_for_a_config_to_import_are_ignored_with_a_note(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    file = other / ADAPTER_CONFIG
    (tmp_path / "megatron.py").write_text("raise AssertionError('code of an adapter ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"megatron_config": {"x": 1}, "megatron_core": "megatron.core"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    notes = load(other, quantization__method="none").notes
    assert f"{file}: megatron_config ignored: not used to load an adapter" in notes


OF_THE_CONFIG: dict[str, tuple[object, str]] = {
    "task_type": ("FOO", "Invalid task type: 'FOO'"),
    "layer_replication": ([[2, 1]], "layer_replication is [[2, 1]], and should be ranges of layers"),
    "layers_to_transform": ([0, 1], "`layers_to_transform` cannot be used when `target_modules` is a str"),
    "use_bdlora": ({}, "matches neither A nor B block-diagonal patterns"),
    "use_dora": (True, "lacks 4 of its weights, such as base_model.model.model.layers.0.mlp.down_proj.lora_magnitude"),
}


@pytest.mark.parametrize("key", OF_THE_CONFIG)
def test_a_fault_of_the_config_is_not_mistaken_for_one_of_the_base(adapter: Path, key: str, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    file = other / ADAPTER_CONFIG
    content = {**json.loads(file.read_text()), key: OF_THE_CONFIG[key][0]}
    if key == "layers_to_transform":
        content["target_modules"] = r".*(q_proj|down_proj)"
    file.write_text(json.dumps(content))
    message = refused(other, ModelError)
    assert OF_THE_CONFIG[key][1] in message
    assert "edited" in message
    assert "Was it trained on this base?" not in message


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_nan_or_infinity_in_a_base_is_named(llama: Path, name: str, method: str, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state[name].view(-1)[3] = float("nan")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(base, ModelError, quantization__method=method)
    assert f"{name} (in model.safetensors)" in message
    assert "not finite (NaN or infinite)" in message


def test_values_that_overflow_fp16_are_reported_as_such(llama: Path) -> None:
    model = load_plain(llama, torch.float16)
    model.get_parameter("model.norm.weight").data[3] = 1e5
    source = find_model(ModelSettings(name=str(llama)))
    checkpoint, base = read_checkpoint(llama, allow_pickle=False), read_config(source, trust_remote_code=False)
    with pytest.raises(ModelError, match=r"model\.norm\.weight \(in model\.safetensors\) holds values that") as caught:
        check_finite(source, checkpoint, base, model)
    assert "--dtype bf16" in str(caught.value.hint)
    check_finite(source, checkpoint, base, load_plain(llama, torch.float16))


def test_an_adapter_that_chooses_among_others_is_refused_by_loading_and_merging(adapter: Path, tmp_path: Path) -> None:
    place = changed_copy(adapter, tmp_path / "arrow", lambda state: state)
    file = place / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"arrow_config": {"top_k": 2}}))
    message = f"the adapter in {place} can't be used: it chooses among other adapters, token by token (arrow_config), "
    assert message in refused(place, ModelError)
    assert message in not_merged(place)
