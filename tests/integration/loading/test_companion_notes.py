"""Each command reports which of template, tokens and rows differ between base, adapter and merged model."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from qlora_cli.events import Noted
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.merging.planning.inputs import read_inputs
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run
from tests.conftest import Recorder, train_settings
from tests.support.models.loading import asked_load, load, save_model
from tests.support.runs.merging import merge, on_plain, request_of, save, stored

OWN = "{% for m in messages %}<<{{ m['role'] }}>>{{ m['content'] }}<|im_end|>{% endfor %}"


def noted(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, Noted)]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = save_model(tmp_path / "base")
    return save(on_plain(base, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter")


def template_alone(adapter: Path) -> str:
    (adapter / "chat_template.jinja").write_text(OWN)
    return "not that of the base"


def tokenizer_without_template(adapter: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(adapter.parent / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(adapter)
    return "that of the base"


def more_tokens(adapter: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(adapter.parent / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    return "has 2 tokens more than the base: '<one>' (id 3072), '<two>' (id 3073)"


def added_tokens_alone(adapter: Path) -> str:
    (adapter / "added_tokens.json").write_text(json.dumps({"<one>": 3072}))
    return "added_tokens.json adds 1 token: '<one>' (id 3072)"


def special_token_alone(adapter: Path) -> str:
    (adapter / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return (
        "the tokenizer, by the adapter's special_tokens_map.json, has 1 token more than the base: '<|end|>' (id 3072)"
    )


CHANGES = [template_alone, tokenizer_without_template, more_tokens, added_tokens_alone, special_token_alone]


@pytest.mark.parametrize("change", CHANGES)
def test_a_load_reports_it_once_as_an_event_and_once_in_its_notes(adapter: Path, change: object) -> None:
    assert callable(change)
    expected, recorder = change(adapter), Recorder()
    load_plan = plan_load(asked_load(adapter), recorder)
    assert [expected in note for note in load_plan.notes].count(True) == 1
    assert [expected in note for note in noted(recorder)].count(True) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_merge_reports_it_and_copies_a_template(adapter: Path, change: object, tmp_path: Path) -> None:
    assert callable(change)
    expected, recorder = change(adapter), Recorder()
    read_inputs(request_of(adapter), recorder)
    assert [expected in note for note in noted(recorder)].count(True) == 1
    merged = merge(adapter, output=tmp_path / "merged").directory
    template = AutoTokenizer.from_pretrained(merged).chat_template
    base = AutoTokenizer.from_pretrained(adapter.parent / "base").chat_template
    assert template == (OWN if change is template_alone else base)


def test_a_merge_reports_how_many_rows_it_adds(adapter: Path, tmp_path: Path) -> None:
    more_tokens(adapter)
    recorder = Recorder()
    read_inputs(request_of(adapter), recorder)
    assert "the merged model's embedding has 3,074 rows, the base's 3,072" in noted(recorder)
    assert stored(merge(adapter, output=tmp_path / "merged").directory)["model.embed_tokens.weight"].shape[0] == 3074
    assert any(note.startswith("the embedding was extended from 3,072 to 3,074 rows") for note in load(adapter).notes)


def test_the_unused_template_of_a_second_adapter_is_noted(adapter: Path, tmp_path: Path) -> None:
    second = save(on_plain(tmp_path / "base", LoraConfig(r=2, target_modules=["v_proj"])), tmp_path / "second")
    template_alone(second)
    recorder = Recorder()
    read_inputs(request_of(adapter, second), recorder)
    (note,) = [note for note in noted(recorder) if "template" in note]
    assert str(second / "chat_template.jinja") in note
    assert note.endswith("is not used")
    (second / "chat_template.jinja").unlink()
    recorder = Recorder()
    read_inputs(request_of(adapter, second), recorder)
    assert not [note for note in noted(recorder) if "template" in note]


def test_copied_prediction_layers_are_noted(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "glm4_moe", num_nextn_predict_layers=1)
    adapter = save(on_plain(base, LoraConfig(r=2, target_modules=["o_proj"])), tmp_path / "adapter")
    tensors = stored(base)
    more = {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)}
    save_file({**tensors, **more}, base / "model.safetensors", metadata={"format": "pt"})
    recorder = Recorder()
    read_inputs(request_of(adapter), recorder)
    assert any("layer 2 of the checkpoint" in note and "copied as stored" in note for note in noted(recorder))


def test_training_reports_it_in_its_plan_and_in_its_result(adapter: Path, rows: Path, tmp_path: Path) -> None:
    expected, recorder = template_alone(adapter), Recorder()
    settings = train_settings(adapter, rows, tmp_path / "run", training__max_steps=1)
    prepared = prepare_run(settings, recorder)
    result = run(prepared, recorder)
    for notes in (prepared.plan.notes, result.notes, noted(recorder)):
        assert [expected in note for note in notes].count(True) == 1
    assert AutoTokenizer.from_pretrained(result.adapter).chat_template == OWN
