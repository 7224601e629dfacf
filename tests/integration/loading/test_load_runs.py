"""A run or an adapter loads with its base as it was trained, continues to train, and gives its final logits."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.model_outline import read_model_outline, settle_base
from qlora_cli.loading.save import save_quantized
from qlora_cli.model_files.source import find_model
from qlora_cli.quantization.embedding import is_tied
from qlora_cli.settings.models import LoadSettings, ModelSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.settings.settle import resolved_in_code
from qlora_cli.training.run_plan import PreparedRun, prepare_run, settle_run
from qlora_cli.training.train_run import run
from tests.conftest import ASSETS, Recorder, train_settings, write_jsonl
from tests.support.models.loading import (
    DAMAGED_PICKLES,
    IDS,
    asked_load,
    copy_tokenizer,
    load,
    logits,
    refused,
    save_model,
)

ADAPTER = "adapter/adapter_model.safetensors"
AS_TRAINED = {"model__dtype": None}  # no flag: the dtype that the run was trained in


@dataclass
class Ended:
    """A run that ended, with the final logits of its model."""

    path: Path
    prepared: PreparedRun
    logits: torch.Tensor


def end(prepared: PreparedRun, ids: torch.Tensor = IDS) -> Ended:
    output = run(prepared, Recorder()).output
    return Ended(output, prepared, logits(prepared.model, ids))


def settings_of(path: Path) -> dict[str, dict[str, object]]:
    settings: dict[str, dict[str, object]] = json.loads((path / "run.json").read_text())["settings"]
    return settings


def trained(model: object) -> dict[str, torch.Tensor]:
    assert isinstance(model, PeftModel)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join((ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:4]) + "\n")
    return path


@pytest.fixture(scope="module")
def ended(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two steps on FP4, single quantization, in fp32, with an adapter of rank 3."""
    directory = tmp_path_factory.mktemp("ended")
    return end(
        prepare_run(
            train_settings(
                save_model(directory / "base"),
                data,
                directory / "run",
                quantization__method="fp4",
                quantization__double_quant=False,
                lora__rank=3,
                training__max_steps=2,
                training__learning_rate=0.01,
            ),
            Recorder(),
        )
    )


# ---- loading


def test_a_run_loads_with_its_adapter_on_the_base_as_it_was_trained(ended: Ended) -> None:
    loaded = load(ended.path, **AS_TRAINED)
    assert isinstance(loaded.model, PeftModel)
    quantization = loaded.settings.quantization
    assert (quantization.method, quantization.double_quant) == ("fp4", False)
    assert loaded.settings.model.dtype == "fp32"
    assert torch.equal(logits(loaded.model), ended.logits)
    assert not torch.equal(logits(loaded.base), logits(load(ended.path.parent / "base").base))
    report = loaded.report()
    assert (report.adapter, report.quantization) == (ended.path / "adapter", "fp4")
    assert report.base_model == str(ended.path.parent / "base")
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_run_on_a_quantized_checkpoint_computes_as_it_was_trained(data: Path, tmp_path: Path) -> None:
    save_quantized(load(save_model(tmp_path / "base")), tmp_path / "stored", SilentReporter())
    asked = {"quantization__compute_dtype": "bf16", "training__max_steps": 1}
    ran = end(prepare_run(train_settings(tmp_path / "stored", data, tmp_path / "run", **asked), Recorder()))
    loaded = load(ran.path, **AS_TRAINED)
    assert loaded.settings.quantization.compute_dtype == "bf16"
    assert torch.equal(logits(loaded.model), ran.logits)


def test_a_flag_wins_over_what_the_run_was_trained_with(ended: Ended) -> None:
    nf4 = load(ended.path, quantization__method="nf4", model__dtype="bf16")
    quantization = nf4.settings.quantization
    assert (quantization.method, quantization.double_quant, nf4.dtype.name) == ("nf4", False, "bf16")
    assert not torch.equal(logits(nf4.model).float(), ended.logits)


def test_only_a_flag_that_differs_from_the_run_is_reported(ended: Ended) -> None:
    recorder = Recorder()
    plan_load(asked_load(ended.path, quantization__method="nf4", quantization__double_quant=False), recorder)
    warnings = [event.message for event in recorder.events if isinstance(event, Noted) and event.level == "warning"]
    assert warnings == [f"quantization.method is nf4 as asked; {ended.path} was trained with fp4"]


def test_an_option_that_the_method_of_the_run_ignores_is_refused(ended: Ended, tmp_path: Path) -> None:
    path = shutil.copytree(ended.path, tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    record["settings"]["quantization"]["method"] = "int8"
    (path / "run.json").write_text(json.dumps(record))
    message = refused(path, ModelError, quantization__compute_dtype="fp32")
    assert f"quantization.compute_dtype: has no effect: {path} is stored in int8" in message


def settled(asked: ModelSettings) -> ModelSettings:
    outline = read_model_outline(find_model(asked), trust_remote_code=False)
    return settle_base(resolved_in_code(LoadSettings(model=asked)), outline).settings.model


def test_only_settings_of_the_base_are_taken_from_a_run_and_never_trust(ended: Ended, tmp_path: Path) -> None:
    path = shutil.copytree(ended.path, tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    written = {
        **{"dtype": "bf16", "rope_scaling": "yarn:2", "resize_vocab": True},
        **{"trust_remote_code": True, "allow_pickle": True, "device": "cuda", "attention": "eager"},
    }
    record["settings"]["model"] |= written
    (path / "run.json").write_text(json.dumps(record))
    asked = ModelSettings(name=str(path))
    taken = settled(asked)
    changed = {key for key in ModelSettings.model_fields if getattr(taken, key) != getattr(asked, key)}
    assert changed == {"dtype", "rope_scaling", "resize_vocab"}
    explicit = ModelSettings(name=str(path), dtype="fp32", rope_scaling=None)
    overridden = settled(explicit)
    assert (overridden.dtype, overridden.rope_scaling) == ("fp32", None)


def test_invalid_settings_of_a_run_are_an_error(ended: Ended, tmp_path: Path) -> None:
    path = shutil.copytree(ended.path, tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    record["settings"]["quantization"]["method"] = "nf3"
    (path / "run.json").write_text(json.dumps(record))
    assert f"the settings in {path / 'run.json'} can't be read: method: " in refused(path, ModelError)


@pytest.fixture
def plain_adapter(tmp_path: Path) -> Path:
    """An adapter that plain PEFT made, on a model of its own, with weights that have an effect."""
    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base"), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_plain_peft_loads_to_the_logits_of_plain_peft(plain_adapter: Path) -> None:
    base = plain_adapter.parent / "base"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), plain_adapter)
    loaded = load(plain_adapter, quantization__method="none")
    assert torch.equal(logits(loaded.model), logits(plain))
    assert not torch.equal(logits(loaded.model), logits(load(base, quantization__method="none").model))
    assert loaded.source.tokenizer_path == base
    assert load(plain_adapter).settings.quantization.method == "nf4"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 128}, "layers.0.mlp.down_proj.lora_B.weight is (64, 2), and the base needs (128, 2)"),
        ({"num_hidden_layers": 1}, "has 4 weights that don't fit the base, such as base_model.model.model."),
        ({"num_hidden_layers": 3}, "lacks 4 of its weights, such as base_model.model.model.layers.2."),
        ({"family": "gpt2"}, "not found in the base model"),
    ],
)
def test_the_adapter_of_another_base_is_refused(
    plain_adapter: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    other = save_model(tmp_path / "other", **changes)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "base")
    other.rename(tmp_path / "base")
    message = refused(plain_adapter, ModelError)
    assert f"the adapter in {plain_adapter}" in message
    assert expected in message
    assert "Was it trained on this base?" in message
    assert len(message.splitlines()) == 1


def test_an_adapter_that_is_not_lora_is_refused(plain_adapter: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(base, config).save_pretrained(plain_adapter)
    assert "is IA3, not LoRA" in refused(plain_adapter, ModelError)


def test_new_tokens_are_not_added_to_an_adapter(plain_adapter: Path) -> None:
    message = refused(plain_adapter, ModelError, model__new_tokens="<a>")
    assert f"{plain_adapter} is an adapter: the rows of --new-tokens <a> would not be trained" in message


# ---- continued training


def test_a_run_continues_to_train_with_its_own_adapter_and_base(ended: Ended, data: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    flags = {
        **{"model.name": str(ended.path), "model.device": "cpu", "data.dataset": str(data)},
        **{"output.directory": str(tmp_path / "on"), "training.max_steps": 2, "training.learning_rate": 0.01},
    }
    given = Sources(flags={path: (path, value) for path, value in flags.items()})
    prepared = prepare_run(resolve(given, TrainSettings), recorder)
    assert f"the adapter in {ended.path / 'adapter'} is trained further" in [
        event.message for event in recorder.events if isinstance(event, Noted)
    ]
    before = trained(prepared.model)
    for name, value in trained(ended.prepared.model).items():
        assert torch.equal(before[name], value)
    assert {value.shape[0] for name, value in before.items() if "lora_A" in name} == {3}
    assert torch.equal(logits(prepared.model), ended.logits)
    assert prepared.plan.num_trainable_parameters == sum(value.numel() for value in before.values())

    on = end(prepared)
    after = trained(prepared.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    again = load(on.path, **AS_TRAINED)
    assert again.settings.quantization.method == "fp4"
    assert torch.equal(logits(again.model), on.logits)
    record = json.loads((on.path / "run.json").read_text())
    assert record["settings"]["quantization"]["double_quant"] is False
    assert record["settings"]["model"]["dtype"] == "fp32"
    assert record["origins"]["quantization.method"] == str(ended.path / "run.json")
    assert record["settings"]["lora"]["rank"] == 3
    assert record["settings"]["lora"]["alpha"] == 32
    assert len(record["settings"]["lora"]["target_modules"]) == 7
    assert record["origins"]["lora.rank"] == str(ended.path / "adapter" / "adapter_config.json")
    assert record["base_model"]["base_model"] == str(ended.path.parent / "base")


def test_the_same_command_again_warns_about_nothing(plain_adapter: Path, data: Path, tmp_path: Path) -> None:
    """Also if the adapter is not ours: the modules it trains are recorded as the adapter's own, and are no change."""
    flags = {
        **{"model.name": str(plain_adapter), "model.device": "cpu", "model.dtype": "fp32", "data.dataset": str(data)},
        **{"output.directory": str(tmp_path / "on"), "training.max_steps": 2, "training.learning_rate": 0.01},
    }
    resolved = resolve(Sources(flags={path: (path, value) for path, value in flags.items()}), TrainSettings)
    end(prepare_run(resolved, Recorder()))
    lora = settings_of(tmp_path / "on")["lora"]
    assert (lora["rank"], lora["target_modules"]) == (2, ["down_proj", "q_proj"])
    recorder = Recorder()
    settled = settle_run(resolved, recorder)
    assert settled.is_done
    notes = [event for event in recorder.events if isinstance(event, Noted)]
    assert not [note.message for note in notes if note.level == "warning" or "changed" in note.message]


def test_training_lora_on_the_head_is_refused_before_a_weight_is_read(data: Path, tmp_path: Path) -> None:
    """TRL computes the loss from the weight of the head and bypasses the adapter on it."""
    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base"), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert isinstance(load(tmp_path / "adapter").model, PeftModel)  # it does generate
    with pytest.raises(
        ModelError, match=r"can't be trained further: it has LoRA on lm_head, whose weight the loss"
    ) as caught:
        settle_run(train_settings(tmp_path / "adapter", data, tmp_path / "on"), Recorder())
    assert "qlora merge" in str(caught.value.hint)
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("skipped", [["nothing"], ["lm_head"]])
def test_training_on_a_quantized_head_is_refused_before_a_weight_is_read(
    data: Path, method: str, skipped: list[str], tmp_path: Path
) -> None:
    """TRL computes the loss from the weight of the head as it is stored."""
    base = save_model(tmp_path / "base", tie_word_embeddings=False)
    flags = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if method == "nf4" else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**flags, llm_int8_skip_modules=skipped)
    stored = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    stored.save_pretrained(tmp_path / "stored")
    copy_tokenizer(tmp_path / "stored")
    settings = train_settings(tmp_path / "stored", data, tmp_path / "run", quantization__method=method)
    if skipped == ["lm_head"]:
        assert settle_run(settings, Recorder()).num_steps
        return
    with pytest.raises(ModelError, match="its head, lm_head, is quantized") as caught:
        settle_run(settings, Recorder())
    assert "16-bit model" in str(caught.value.hint)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_head_tied_to_the_embedding_is_refused_before_a_weight_is_read(
    method: str, tmp_path: Path
) -> None:
    """Plain transformers writes one if it is configured to skip other modules, and fails at the first token."""
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    flags = {"load_in_4bit": True} if method == "nf4" else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**flags, llm_int8_skip_modules=["q_proj"])
    stored = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    stored.save_pretrained(tmp_path / "stored")
    copy_tokenizer(tmp_path / "stored")
    with pytest.raises(ModelError, match="it has lm_head quantized, which is tied to the embedding"):
        plan_load(asked_load(tmp_path / "stored"), Recorder())


def test_the_settings_of_an_adapter_that_continues_to_train_can_not_be_changed(
    ended: Ended, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"is an adapter, which is trained further as it is: lora.rank can't be changed"
    ):
        prepare_run(train_settings(ended.path, data, tmp_path / "on", lora__rank=8), Recorder())


# ---- new tokens


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    row = {"prompt": "Call <a>getcwd<b>. ", "completion": "<a>os.getcwd()<b>"}
    return write_jsonl(tmp_path / "tagged.jsonl", [row] * 4)


def rows_of(prepared: PreparedRun) -> list[torch.Tensor]:
    """Return the trained weights of embedding and head, `(vocabulary, hidden)`."""
    model = prepared.model.get_base_model()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
        multiplied = model.get_output_embeddings()(torch.eye(model.config.hidden_size)).T
    return [embedded.clone(), multiplied.clone()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("vocab_size", [3072, 3136], ids=["grown", "spare"])
def test_only_the_rows_of_new_tokens_train_and_are_loaded_again(
    tagged: Path, tmp_path: Path, tied: bool, vocab_size: int
) -> None:
    model = save_model(tmp_path / "model", tie_word_embeddings=tied, vocab_size=vocab_size)
    flags = {"model__new_tokens": "<a>,<b>", "model__resize_vocab": True, "training__learning_rate": 0.01}
    prepared = prepare_run(train_settings(model, tagged, tmp_path / "run", **flags), Recorder())
    assert prepared.loaded.new_token_ids == (3072, 3073)
    before = rows_of(prepared)
    ids = torch.tensor([[20, 3072, 21, 3073, 22]])
    ended = end(prepared, ids)
    after = rows_of(prepared)
    for old, new in zip(before, after, strict=True):
        moved = (old != new).any(dim=1).nonzero().flatten().tolist()
        assert moved == [3072, 3073]
    assert torch.equal(*after) == tied
    again = load(ended.path, **AS_TRAINED)
    assert torch.equal(logits(again.model, ids), ended.logits)
    assert is_tied(load(model, model__new_tokens="<a>,<b>").base) == tied
    assert again.tokenizer("<a>", add_special_tokens=False)["input_ids"] == [3072]
    # The adapter holds two rows of each, not the embedding.
    largest = max(
        tensor.shape[0] for name, tensor in load_file(ended.path / ADAPTER).items() if "token_adapter" in name
    )
    assert largest == 2
    assert settings_of(ended.path)["model"]["new_tokens"] == ["<a>", "<b>"]


def test_a_grown_vocabulary_without_new_tokens_loads_unchanged(data: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=3008)
    ended = end(
        prepare_run(train_settings(model, data, tmp_path / "run", model__resize_vocab=True), Recorder()),
        torch.tensor([[20, 3008, 21, 3071, 22]]),
    )
    again = load(ended.path, **AS_TRAINED)
    assert again.settings.model.resize_vocab
    assert torch.equal(logits(again.model, torch.tensor([[20, 3008, 21, 3071, 22]])), ended.logits)
    assert again.tokenizer.pad_token == ended.prepared.loaded.tokenizer.pad_token
    assert all("lora_" in name for name in load_file(ended.path / ADAPTER))


def test_a_pad_token_that_was_added_stays_the_pad_token(data: Path, tmp_path: Path) -> None:
    # A tokenizer without a pad token, and a model without a spare row.
    model = save_model(tmp_path / "model", pad_token_id=None)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).write_text((model / file).read_text().replace("<|pad|>", "<|nothing|>"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": config["eos_token"]}))
    settings = train_settings(model, data, tmp_path / "run", model__resize_vocab=True)
    ended = end(prepare_run(settings, Recorder()))
    assert ended.prepared.loaded.tokenizer.pad_token_id == 3072
    for source in (ended.path, ended.path / "adapter"):
        loaded = load(source, **AS_TRAINED)
        assert (loaded.tokenizer.pad_token, loaded.tokenizer.pad_token_id) == ("<|pad|>", 3072)
        assert loaded.base.get_input_embeddings().num_embeddings == 3073


# ---- damaged adapters


@pytest.fixture
def damageable(ended: Ended, tmp_path: Path) -> Path:
    """A copy of the adapter alone, on the base of the run."""
    adapter = shutil.copytree(ended.path / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(ended.path.parent / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


@pytest.mark.parametrize("content", ["truncated", "empty", "garbage"])
def test_a_damaged_adapter_is_named_before_the_base_is_read(
    damageable: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damageable / "adapter_model.safetensors"
    path.write_bytes({"truncated": path.read_bytes()[:-100], "empty": b"", "garbage": b"garbage!" * 10}[content])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    message = refused(damageable, ModelError)
    assert f"{path} is damaged: it " in message
    assert f"Copy {path.name} again" in message


@pytest.mark.parametrize("damage", DAMAGED_PICKLES)
def test_a_damaged_pickle_of_an_adapter_is_named_before_the_base_is_read(
    damageable: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damageable / "adapter_model.bin"
    torch.save(load_file(damageable / "adapter_model.safetensors"), path)
    (damageable / "adapter_model.safetensors").unlink()
    assert load(damageable, model__allow_pickle=True).report().adapter == damageable
    DAMAGED_PICKLES[damage](path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    message = refused(damageable, ModelError, model__allow_pickle=True)
    assert f"{path} can't be read: " in message
    assert f"Copy {path.name} again" in message
