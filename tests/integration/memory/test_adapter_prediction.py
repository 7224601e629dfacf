"""The memory of continuing to train an adapter is predicted from that adapter's own config and shapes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError, ModelNotFoundError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import load_planned
from qlora_cli.memory import prediction_cache
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.memory_report import inspect_memory
from qlora_cli.memory.prediction import MemoryReport
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.models import InspectMemorySettings
from qlora_cli.settings.settle import resolved_in_code
from qlora_cli.training.run_plan import settle_run
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.support.models.loading import asked_load, save_model
from tests.support.models.predictions import leave_out_catalogue
from tests.support.models.reference_models import ROWS, load_plain
from tests.support.models.vision_language import load_full, save_full
from tests.support.runs.merging import adapted, save, save_changing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use an empty prediction cache of its own for each test, and predict for the card that is named alone."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    leave_out_catalogue(monkeypatch)


KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "another rank": ("llama", {"r": 3}, 0),
    "rank by pattern": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, 0),
    "a pattern": ("llama", {"target_modules": r".*\.1\..*(q_proj|v_proj)"}, 0),
    "one layer": ("llama", {"layers_to_transform": [1]}, 0),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, 0),
    "DoRA": ("llama", {"use_dora": True}, 0),
    "LoRA on the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, 0),
    "LoRA on the embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, 0),
    "modules trained whole": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    "tied modules trained whole": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    "rows": ("llama", {"trainable_token_indices": [5, 7]}, 0),
    "a grown vocabulary": ("llama", {}, 64),
    "a grown vocabulary trained whole": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, 64),
    "biases": ("qwen2", {"bias": "all"}, 0),
    "a model with towers": ("gemma3", {"target_modules": r".*language_model.*(q_proj|down_proj)"}, 0),
    "towers, by end": ("gemma3", {"target_modules": r".*(q_proj|down_proj)", "exclude_modules": ".*vision.*"}, 0),
    "towers, rank by pattern": (
        "gemma3",
        {
            "target_modules": ["q_proj", "down_proj"],
            "exclude_modules": ".*vision.*",
            "rank_pattern": {"language_model.layers.1.self_attn.q_proj": 2},
        },
        0,
    ),
}


def base_of(kind: str, place: Path) -> Path:
    if kind == "gemma3":
        return save_full(place, kind)
    family = kind if kind == "qwen2" else "llama"
    return save_model(place, family, vocab_size=ROWS, tie_word_embeddings=kind == "tied")


def adapter_of(kind: str, place: Path) -> Path:
    base, values, more_rows = KINDS[kind]
    checkpoint = base_of(base, place / "base")
    model = load_full(checkpoint, base) if base == "gemma3" else load_plain(checkpoint)
    if more_rows:
        model.resize_token_embeddings(ROWS + more_rows, mean_resizing=False)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **values}
    lora = LoraConfig(**config, base_model_name_or_path=str(checkpoint))
    return save(adapted(model, lora), place / "adapter")


def request_of(values: dict[str, Any]) -> MemoryRequest:
    asked = resolved_in_code(InspectMemorySettings.model_validate(values))
    return MemoryRequest(asked=asked, gpus=(find_gpu("RTX 4090"),))


def predicted(model: Path, **lora: object) -> MemoryReport:
    """Predict with nothing to plan and no other storage to try, which takes further traces."""
    asked = {
        "model": {"name": str(model)},
        "quantization": {"method": "nf4"},
        "lora": lora,
        "data": {"max_length": 64},
        "training": {"gradient_checkpointing": "on"},
    }
    return inspect_memory(request_of(asked), SilentReporter())


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_number_of_trained_parameters_is_the_real_one(kind: str, tmp_path: Path) -> None:
    adapter = adapter_of(kind, tmp_path)
    settings, silent = asked_load(adapter, model__dtype="bf16", quantization__method="nf4"), SilentReporter()
    loaded = load_planned(plan_load(settings, silent), silent, trains_adapter=True)
    assert isinstance(loaded.model, PeftModel)
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    report = predicted(adapter)
    assert report.num_trainable_parameters == sum(parameter.numel() for parameter in trained)
    assert report.num_parameters == loaded.inventory.num_parameters
    held = sum(parameter.nbytes for parameter in trained)
    if KINDS[kind][2] and "modules_to_save" not in KINDS[kind][1]:  # embedding and head are copies next to the base's
        held += 2 * 2 * (ROWS + 64) * loaded.base.config.hidden_size
    assert report.components.adapters_bytes >= held
    if kind == "another rank":
        assert (report.settings["rank"], report.settings["target-modules"]) == ("3", "down_proj,q_proj")


def test_an_adapter_is_predicted_like_a_new_one_and_its_config_can_not_be_changed(tmp_path: Path) -> None:
    adapter = adapter_of("another rank", tmp_path)
    of_new = predicted(tmp_path / "base", rank=3, target_modules="q_proj,down_proj")
    assert predicted(adapter).predicted == of_new.predicted == predicted(adapter, rank=3).predicted
    with pytest.raises(
        ModelError, match=r"is an adapter, which is trained further as it is: lora\.rank can't be changed"
    ):
        predicted(adapter, rank=4)
    request = request_of({"model": {"name": str(adapter)}, "inspect_memory": {"solve": ["rank"]}})
    with pytest.raises(ModelError, match="which training does not change"):
        inspect_memory(request, SilentReporter())


@pytest.mark.parametrize(
    "kind", ["modules trained whole", "a model with towers", "towers, by end", "towers, rank by pattern"]
)
def test_the_config_alone_is_used_without_weights_that_have_a_header(kind: str, tmp_path: Path) -> None:
    adapter = adapter_of(kind, tmp_path)
    whole = predicted(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    alone = predicted(adapter)
    assert alone.num_trainable_parameters == whole.num_trainable_parameters
    assert any("by its config alone" in assumption for assumption in alone.assumptions)


@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("kind", ["LoRA on the head", "olora", "pissa", "layers"])
def test_the_report_notes_that_train_would_refuse_an_adapter(
    kind: str, is_pickled: bool, rows: Path, tmp_path: Path
) -> None:
    adapter = adapter_of("LoRA on the head", tmp_path)
    if kind != "LoRA on the head":
        adapter = save_changing(tmp_path / "base", tmp_path / kind, kind)
    if is_pickled:
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        settle_run(train_settings(adapter, rows, tmp_path / "run", model__allow_pickle=is_pickled), Recorder())
    assert f"qlora train would refuse this: {caught.value}" in predicted(adapter).assumptions


def test_the_adapter_is_part_of_the_key_of_a_cached_prediction(tmp_path: Path) -> None:
    first = adapter_of("another rank", tmp_path / "first")
    second = adapter_of("rows", tmp_path / "second")
    keys = set()
    for adapter in (first, second, tmp_path / "first" / "base"):
        before = set((tmp_path / "cache" / "memory").glob("*.json"))
        predicted(adapter)
        keys |= set((tmp_path / "cache" / "memory").glob("*.json")) - before
    assert len(keys) == 3
    assert prediction_cache.load("none of them") is None


def test_a_run_that_continued_an_adapter_is_predicted_by_its_adapter(rows: Path, tmp_path: Path) -> None:
    """Its targets are a pattern, which no settings can express."""
    adapter = adapter_of("a pattern", tmp_path)
    settings = train_settings(adapter, rows, tmp_path / "run", training__max_steps=1, training__learning_rate=0.01)
    trained = train(settings, Recorder())
    assert predicted(tmp_path / "run").num_trainable_parameters == trained.num_trainable_parameters
    with pytest.raises(ModelError, match=r"lora\.rank can't be changed"):
        predicted(tmp_path / "run", rank=8)


def test_an_unfinished_run_that_trains_an_adapter_further_is_predicted_by_its_newest_checkpoint_or_first_adapter(
    rows: Path, tmp_path: Path
) -> None:
    adapter, run = adapter_of("a pattern", tmp_path), tmp_path / "run"
    steps = {"training__max_steps": 2, "training__save_steps": 1, "training__learning_rate": 0.01}
    trained = train(train_settings(adapter, rows, run, **steps), Recorder())
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running", "result": None}))
    shutil.rmtree(run / "adapter")
    (run / "checkpoints" / "step-2" / "adapter_config.json").write_text("{}")  # damaged
    assert predicted(run).num_trainable_parameters == trained.num_trainable_parameters
    shutil.rmtree(run / "checkpoints")
    assert predicted(run).num_trainable_parameters == trained.num_trainable_parameters
    adapter.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelNotFoundError, match="the adapter that it began with is not here"):
        predicted(run)


def test_an_adapter_with_rows_for_new_tokens_is_predicted_as_its_tokenizer_says(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    new: dict[str, Any] = {"model__new_tokens": "<a1>,<a2>", "training__max_steps": 1}
    first = train(train_settings(base_model, rows, tmp_path / "first", **new), Recorder())
    on = train(train_settings(first.adapter, rows, tmp_path / "on", training__max_steps=1), Recorder())
    silent = SilentReporter()
    loaded = load_planned(plan_load(asked_load(first.adapter), silent), silent, trains_adapter=True)
    num_trained = sum(one.numel() for one in loaded.model.parameters() if one.requires_grad)
    for model in (first.adapter, first.output, on.adapter, on.output):
        assert predicted(model).num_trainable_parameters == num_trained
    assert predicted(first.adapter).num_parameters == loaded.inventory.num_parameters
    (first.adapter / "adapter_model.safetensors").unlink()  # as on the hub, from where only the config is read
    (first.adapter / "tokenizer.json").unlink()
    assert predicted(first.adapter).num_trainable_parameters == num_trained


def test_an_adapter_that_lacks_a_tensor_is_refused_as_by_training(tmp_path: Path) -> None:
    adapter = adapter_of("another rank", tmp_path)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks 8 of its weights") as caught:
        plan_load(asked_load(adapter), SilentReporter())
    with pytest.raises(ModelError, match="lacks 8 of its weights") as predicted_error:
        predicted(adapter)
    assert str(predicted_error.value) == str(caught.value)
