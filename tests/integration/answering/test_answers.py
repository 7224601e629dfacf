"""Answers of real models: the base under any adapter, the adapter as it was trained, and the merged model."""

import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.adapters.writer import save_adapter
from qlora_cli.answering import answer_prompts as answering
from qlora_cli.answering.answer_prompts import generate
from qlora_cli.answering.answers import Answer, GenerationReport, Source
from qlora_cli.answering.conversation import Chat
from qlora_cli.answering.open_model import open_model
from qlora_cli.answering.prompts import Message, encode
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.events import Noted, Reporter, SilentReporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.settings.models import AnswerSettings, LoadSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run
from tests.conftest import ASSETS, Recorder, RunQlora, train_settings
from tests.support.models.adapters import adapt, settings_of, train_steps
from tests.support.models.experts import save_moe
from tests.support.models.loading import asked_load, copy_tokenizer, load, save_model
from tests.support.runs.merging import save_changing

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "What does os.getcwd() do?"
SILENT = SilentReporter()
REQUEST = AnswerSettings(max_new_tokens=12)
COMPARE = AnswerSettings(max_new_tokens=12, compare=True)
AS_TRAINED: dict[str, Any] = {"model__dtype": None}
LOAD_PLANNED = "qlora_cli.answering.open_model.load_planned"


def texts(report: GenerationReport) -> dict[Source, str]:
    """Return the answer of each source to the one prompt."""
    (given,) = report.answers
    return {answer.source: answer.text for answer in given.answers}


def ask(model: Path, request: AnswerSettings = REQUEST, prompt: str = PROMPT, **flags: object) -> GenerationReport:
    return generate(asked_load(model, **flags), request, [prompt], SILENT)


def adapted(directory: Path, base: Path, num_steps: int = 2, **lora: Any) -> Path:
    """Train an adapter on `base` for a few steps, so that it changes answers, and return where it was saved."""
    init, quant = lora.get("init_lora_weights"), lora.pop("quant", "nf4")
    model = adapt(base, settings_of(**lora), quantization__method="none" if init == "pissa" else quant)
    train_steps(model, num_steps, learning_rate=5e-2)
    save_adapter(model, directory)
    return directory


@dataclass
class Ended:
    """A run, and its adapter merged into the unquantized base, in a directory next to it."""

    run: Path
    merged: Path


@pytest.fixture(scope="module")
def ended(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A few steps on the bundled base in FP4; the merged model is outside the run, and tests may link it into it."""
    directory = tmp_path_factory.mktemp("ended")
    rows = directory / "rows.jsonl"
    rows.write_text("\n".join((ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:16]) + "\n")
    asked = {"quantization__method": "fp4", "training__max_steps": 6, "training__learning_rate": 1e-2}
    run(prepare_run(train_settings(base_model, rows, directory / "run", **asked), Recorder()), Recorder())
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    PeftModel.from_pretrained(base, directory / "run" / "adapter").merge_and_unload().save_pretrained(
        directory / "merged"
    )
    copy_tokenizer(directory / "merged")
    return Ended(directory / "run", directory / "merged")


# ---- base and adapter


def test_a_run_answers_with_its_adapter_on_the_base_as_it_was_trained(ended: Ended) -> None:
    report = ask(ended.run, **AS_TRAINED)
    ((answer,),) = (given.answers for given in report.answers)
    loaded = load(ended.run, **AS_TRAINED)
    assert loaded.settings.quantization.method == "fp4"
    ids = encode(loaded.tokenizer, [{"role": "user", "content": PROMPT}])
    expected = loaded.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert answer.source == "adapter"
    assert answer.text == str(loaded.tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)).strip()
    assert answer.num_prompt_tokens == len(ids)
    assert report.adapter == ended.run / "adapter"


def test_base_and_adapter_of_a_run_answer_as_each_does_alone(ended: Ended, base_model: Path) -> None:
    answers = texts(ask(ended.run, COMPARE, **AS_TRAINED))
    assert list(answers) == ["base", "adapter"]
    assert answers["adapter"] == texts(ask(ended.run, **AS_TRAINED))["adapter"]
    assert answers["base"] == texts(ask(base_model, quantization__method="fp4"))["base"]
    assert answers["base"] != answers["adapter"]


ON_EXPERTS: dict[str, Any] = {"target_parameters": "all-experts"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "whole head": {"modules_to_save": ("lm_head",)},
    "int8": {"quant": "int8"},
    "loftq": {"init_lora_weights": "loftq"},
}


@pytest.mark.parametrize("kind", [*ADAPTERS, "experts"])
def test_every_kind_of_model_answers_as_its_base_with_the_adapter_off(tmp_path: Path, kind: str) -> None:
    if kind == "experts":
        base, lora = save_moe(tmp_path / "base", "qwen3_moe"), ON_EXPERTS
    else:
        base, lora = save_model(tmp_path / "base", tie_word_embeddings=False), dict(ADAPTERS[kind])
    flags: dict[str, Any] = {"quantization__method": lora["quant"]} if "quant" in lora else {}
    adapter = adapted(tmp_path / "adapter", base, **lora)
    answers = texts(ask(adapter, COMPARE, **flags))
    assert answers["base"] == texts(ask(base, **flags))["base"]
    assert answers["adapter"] == texts(ask(adapter, **flags))["adapter"]
    assert answers["base"] != answers["adapter"]


def test_the_base_of_an_adapter_with_new_tokens_answers_without_their_trained_rows(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"model__new_tokens": "<a>,<b>", "training__learning_rate": 1e-2}
    ran = run(prepare_run(train_settings(base_model, rows, tmp_path / "run", **asked), Recorder()), Recorder())
    answers = texts(ask(ran.output, COMPARE, **AS_TRAINED))
    assert answers["base"] == texts(ask(base_model))["base"] != answers["adapter"]


def test_answers_in_16_bit_use_adapter_and_whole_head_in_fp32(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=False)
    adapter = adapted(tmp_path / "adapter", base, modules_to_save=("lm_head",))
    assert list(texts(ask(adapter, COMPARE, model__dtype="bf16"))) == ["base", "adapter"]


@pytest.mark.parametrize("kind", ["pissa", "olora", "layers"])
def test_an_adapter_that_changes_its_base_has_none_to_compare_with(kind: str, tmp_path: Path) -> None:
    adapter = save_changing(save_model(tmp_path / "base"), tmp_path / "adapter", kind)
    whole: dict[str, Any] = {"quantization__method": "none"}
    assert "adapter" in texts(ask(adapter, **whole))
    with pytest.raises(ModelError, match=r"the base of .* can't be shown"):
        ask(adapter, COMPARE, **whole)


# ---- the merged model


def test_the_merged_model_of_a_run_is_found_and_answers_as_adapter_and_base_together(ended: Ended) -> None:
    # On the unquantized base, into which the adapter was merged, both are the same model.
    flags: dict[str, Any] = {**AS_TRAINED, "quantization__method": "none", "quantization__double_quant": None}
    (ended.run / "merged").symlink_to(ended.merged)
    try:
        report = ask(ended.run, COMPARE, **flags)
        (checkpoint, *_) = sorted((ended.run / "checkpoints").iterdir())
        assert list(texts(ask(checkpoint, COMPARE, **flags))) == ["base", "adapter"]  # the checkpoint was not merged
    finally:
        (ended.run / "merged").unlink()
    answers = texts(report)
    assert list(answers) == ["base", "adapter", "merged"]
    assert answers["adapter"] == answers["merged"] != answers["base"]
    assert report.merged == ended.run / "merged"
    assert report.answers[0].differ is True


@pytest.mark.parametrize(
    ("flags", "is_noted"), [([], True), (["--quant", "none"], False), (["--quant", "nf4"], False)]
)
def test_a_merged_model_that_is_quantized_again_unasked_is_noted(
    ended: Ended, tmp_path: Path, run_qlora: RunQlora, flags: list[str], is_noted: bool
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(ended.merged, merged)
    arguments = ["generate", str(merged), "--prompt", "Hello", "--max-new-tokens", "1", *flags]
    assert "quantized again" not in run_qlora(*arguments).stderr  # not known to be merged
    (merged / "merge.json").write_text("{}", encoding="utf-8")
    done = run_qlora(*arguments)
    assert done.code == 0
    assert ("is quantized again" in done.stderr) is is_noted


def test_a_merged_model_is_compared_with_a_plain_base_too(ended: Ended, base_model: Path) -> None:
    request = AnswerSettings(max_new_tokens=12, compare=True, merged=ended.merged)
    answers = texts(ask(base_model, request))
    assert list(answers) == ["base", "merged"]
    assert answers["merged"] == texts(ask(ended.merged, quantization__method="none"))["base"]


@dataclass(frozen=True)
class Loading:
    """A model that is about to be loaded, and how many models loaded earlier are still in memory."""

    quantization: str
    dtype: str
    num_in_memory: int


def loadings(monkeypatch: pytest.MonkeyPatch) -> list[Loading]:
    """Return a list to which each model loaded from now on is added."""
    seen: list[Loading] = []
    models: list[weakref.ref[Any]] = []

    def load_and_record(load_plan: LoadPlan, reporter: Reporter) -> LoadedModel:
        num_in_memory = len([model for model in models if model() is not None])
        seen.append(Loading(load_plan.settings.quantization.method.value, load_plan.dtype.name.value, num_in_memory))
        loaded = load_planned(load_plan, reporter)
        models.append(weakref.ref(loaded.base))
        return loaded

    monkeypatch.setattr(LOAD_PLANNED, load_and_record)
    return seen


def test_the_merged_model_is_loaded_unquantized_after_the_first_is_freed(
    ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = loadings(monkeypatch)
    ask(ended.run, AnswerSettings(max_new_tokens=2, compare=True, merged=ended.merged), **AS_TRAINED)
    assert seen == [Loading("fp4", "fp32", 0), Loading("none", "fp32", 0)]


def test_a_merged_checkpoint_that_is_quantized_is_loaded_as_it_is_stored(
    ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_quantized(load(ended.merged), tmp_path / "stored", SILENT)
    seen = loadings(monkeypatch)
    ask(ended.run, AnswerSettings(max_new_tokens=2, compare=True, merged=tmp_path / "stored"), **AS_TRAINED)
    assert [each.quantization for each in seen] == ["fp4", "nf4"]


# ---- refused before weights are read


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(LOAD_PLANNED, read)


@pytest.mark.usefixtures("no_weights")
def test_a_prompt_that_exceeds_the_positions_is_reported_with_the_tokens_left(base_model: Path) -> None:
    with pytest.raises(ModelError, match=r"has 12 tokens, .* allows 501 more: .* the 512 positions") as caught:
        ask(base_model, AnswerSettings(max_new_tokens=501), prompt="hi")
    assert caught.value.hint == "Use --max-new-tokens 500, or a shorter prompt."
    with pytest.raises(ModelError) as caught:
        ask(base_model, AnswerSettings(max_new_tokens=1), prompt="hi " * 600)
    assert caught.value.hint == "Use a shorter prompt."


@pytest.mark.usefixtures("no_weights")
def test_nothing_to_compare_is_an_error(base_model: Path) -> None:
    with pytest.raises(ModelError, match="has no adapter"):
        ask(base_model, COMPARE)


@pytest.mark.usefixtures("no_weights")
def test_a_chat_compares_no_merged_model(base_model: Path, tmp_path: Path) -> None:
    request = AnswerSettings(max_new_tokens=12, compare=True, merged=tmp_path)
    with pytest.raises(ModelError, match="has no adapter") as caught:
        open_model(asked_load(base_model), request, SILENT, is_chat=True)
    assert "qlora generate" in str(caught.value.hint)


@pytest.mark.usefixtures("no_weights")
def test_a_chat_without_a_template_is_refused_with_a_way_out(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template") as caught:
        open_model(asked_load(base), REQUEST, SILENT, is_chat=True)
    assert "--chat-template chatml" in str(caught.value.hint)


def test_a_prompt_is_continued_with_a_note_if_there_is_no_template(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    heard = Recorder()
    report = generate(asked_load(base), REQUEST, ["hi"], heard)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert report.answers[0].answers[0].num_prompt_tokens == len(tokenizer("hi")["input_ids"])
    assert [note for note in report.notes if "no chat template" in note]
    assert [event for event in heard.events if isinstance(event, Noted) and "no chat template" in event.message]


def test_a_gpu_without_memory_for_an_answer_ends_with_exit_code_3(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    opened = open_model(asked_load(base_model), REQUEST, SILENT)
    monkeypatch.setattr(opened.loaded.model, "generate", runs_out)
    with pytest.raises(OutOfMemoryError, match="ran out of memory answering") as caught:
        answering.answer_prompt(opened, REQUEST, "hi")
    assert caught.value.exit_code == 3


# ---- a conversation


class Listener:
    """Collects answers, and stops one after `stop_after` pieces."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.heard: list[str] = []
        self._stop_after = stop_after
        self._num_pieces = 0

    def begin(self, source: Source) -> None:
        self._num_pieces = 0
        self.heard.append(f"{source}:")

    def text(self, piece: str) -> None:
        self._num_pieces += 1
        self.heard[-1] += piece

    def stops(self) -> bool:
        return self._stop_after is not None and self._num_pieces >= self._stop_after

    def end(self, answer: Answer) -> None:
        assert self.heard[-1] == f"{answer.source}:{answer.text}"


def chat_with(settings: Resolved[LoadSettings], request: AnswerSettings = REQUEST) -> Chat:
    return Chat(open_model(settings, request, SILENT, is_chat=True), request)


def answer_to(model: Path, messages: list[Message], **flags: object) -> str:
    """Return the answer to a whole conversation given at once."""
    opened = open_model(asked_load(model, **flags), REQUEST, SILENT)
    return opened.answer(opened.sources[-1], encode(opened.loaded.tokenizer, messages)).text


def test_a_turn_is_answered_in_the_context_of_earlier_turns(ended: Ended) -> None:
    chat = chat_with(asked_load(ended.run, **AS_TRAINED))
    (first,) = chat.ask("What is a list?", Listener())
    (second,) = chat.ask("And a tuple?", Listener())
    conversation = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And a tuple?"},
    ]
    assert second.text == answer_to(ended.run, conversation, **AS_TRAINED)
    assert second.text != answer_to(ended.run, conversation[2:], **AS_TRAINED)
    chat.reset()
    assert chat.ask("What is a list?", Listener())[0].text == first.text
    chat.set_system("Be brief.")
    chat.reset()
    (briefly,) = chat.ask("What is a list?", Listener())
    assert briefly.num_prompt_tokens > first.num_prompt_tokens


def test_base_and_adapter_answer_and_the_conversation_continues_with_the_adapter(ended: Ended) -> None:
    chat, listener = chat_with(asked_load(ended.run, **AS_TRAINED), COMPARE), Listener()
    base, adapter = chat.ask(PROMPT, listener)
    assert [text.partition(":")[0] for text in listener.heard] == ["base", "adapter"]
    assert base.text != adapter.text
    conversation = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": adapter.text},
        {"role": "user", "content": "Why?"},
    ]
    assert chat.ask("Why?", Listener())[-1].text == answer_to(ended.run, conversation, **AS_TRAINED)


def test_the_part_of_a_stopped_answer_stays_in_the_conversation(ended: Ended) -> None:
    chat = chat_with(asked_load(ended.run, **AS_TRAINED))
    (part,) = chat.ask("What is a list?", Listener(stop_after=3))
    assert part.finish_reason == "interrupted"
    conversation = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": part.text},
        {"role": "user", "content": "Go on."},
    ]
    assert chat.ask("Go on.", Listener())[0].text == answer_to(ended.run, conversation, **AS_TRAINED)


def test_a_full_conversation_is_reported_and_continues_after_a_reset(base_model: Path) -> None:
    chat = chat_with(asked_load(base_model))
    filling = "word " * 240
    (last,) = chat.ask(filling, Listener())
    (short,) = chat.ask("word " * ((512 - last.num_prompt_tokens - last.num_new_tokens) // 2 - 15), Listener())
    assert short.num_prompt_tokens + short.num_new_tokens <= 512
    with pytest.raises(ModelError, match=r"has grown to [\d,]+ tokens, and the model has 512 positions") as caught:
        chat.ask(filling, Listener())
    assert "/reset" in str(caught.value.hint)
    chat.reset()
    assert chat.ask("hi", Listener())[0].num_prompt_tokens == 12


def test_an_answer_takes_only_the_positions_that_are_left(base_model: Path) -> None:
    request = AnswerSettings(max_new_tokens=1000)
    opened = open_model(asked_load(base_model), request, SILENT, is_chat=True)
    num_tokens = len(encode(opened.loaded.tokenizer, [{"role": "user", "content": "word " * 240}]))
    (answer,) = Chat(opened, request).ask("word " * 240, Listener())
    assert answer.num_new_tokens <= 512 - num_tokens


def test_a_repeated_question_draws_another_answer_and_a_chat_is_reproducible(base_model: Path) -> None:
    request = AnswerSettings(max_new_tokens=12, temperature=1.0, seed=3)

    def twice() -> list[str]:
        chat, answers = chat_with(asked_load(base_model), request), []
        for _ in range(2):
            answers.append(chat.ask("hi", Listener())[0].text)
            chat.reset()
        return answers

    first, second = twice()
    assert first != second
    assert twice() == [first, second]
