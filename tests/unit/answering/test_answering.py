"""Generating answers: settings, the tokens of a prompt, answers as they are generated, and how they are shown."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.answering.answer_checks import check_merged
from qlora_cli.answering.answerer import Answerer, Watch
from qlora_cli.answering.answers import (
    Answer,
    FinishReason,
    GenerationReport,
    Source,
    collect,
    prompt_name,
    truncation_note,
)
from qlora_cli.answering.prompts import check_system, encode, messages_of, written
from qlora_cli.cli.rendering import answer_text
from qlora_cli.cli.rendering.answer_text import AnswerPrinter, verdict
from qlora_cli.errors import ModelError, SettingsError
from qlora_cli.settings.models import SECTIONS, AnswerSettings, GenerateSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.settings.setting_metadata import field_metadata
from qlora_cli.visible import escape_controls
from tests.support.models.chat_tokenizers import make_sentencepiece, make_tokenizer

HOSTILE = "[bold]a\x1b[2J\x07\x9b1m\u202eb\nc\td\r"
PROMPT = "What does os.getcwd() do?"


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_model)
    return loaded


@pytest.fixture(scope="module")
def model(base_model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    return loaded


@pytest.fixture
def answerer(tokenizer: PreTrainedTokenizerBase) -> Answerer:
    return Answerer(tokenizer=tokenizer, end_ids={4}, dtype=torch.float32, max_tokens=24)


def an_answer(text: str = "yes", source: Source = "base", reason: FinishReason = "stop", num_new: int = 3) -> Answer:
    return Answer(
        source=source,
        text=text,
        num_prompt_tokens=5,
        num_new_tokens=num_new,
        finish_reason=reason,
        seconds=0.5,
        tokens_per_second=6.0,
    )


# ---- settings


def problems_of(*given: tuple[str, object]) -> list[str]:
    """Return the problems with the settings of generate that these flags give."""
    fields = SECTIONS["generate"].model_fields
    paths = {field_metadata(field).flag: f"generate.{key}" for key, field in fields.items()}
    flags = {"model.name": ("MODEL", "m"), "generate.prompts": ("--prompt", ["a"])}
    try:
        resolve(Sources(flags={**flags, **{paths[flag]: (flag, value) for flag, value in given}}), GenerateSettings)
    except SettingsError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, []),
        ({"--temperature": "0.7", "--top-p": "1.0", "--top-k": "1", "--seed": "0"}, []),
        ({"--top-p": "0.9", "--top-k": "5", "--seed": "1"}, ["--top-p", "--top-k", "--seed"]),
        ({"--temperature": "1", "--top-p": "0", "--top-k": "0", "--seed": "-1"}, ["--top-p", "--top-k", "--seed"]),
        ({"--temperature": "1", "--top-p": "1.5", "--seed": str(2**32)}, ["--top-p", "--seed"]),
        ({"--temperature": "nan", "--top-k": "1"}, ["--temperature"]),
        ({"--temperature": "inf"}, ["--temperature"]),
        ({"--temperature": "-1"}, ["--temperature"]),
    ],
)
def test_sampling_out_of_bounds_or_without_effect_is_refused_by_its_flag(
    given: dict[str, str], refused: list[str]
) -> None:
    assert [problem.split(":")[0] for problem in problems_of(*given.items())] == refused


def test_all_problems_of_the_settings_are_reported_at_once() -> None:
    prompts = ("--prompt", ["fine", "", "x\udcff"])
    assert problems_of(prompts, ("--system", " "), ("--max-new-tokens", "0"), ("--merged", "m")) == [
        "--prompt: is empty",
        "--prompt: is not UTF-8",
        "--system: is empty",
        "--max-new-tokens: must be greater than or equal to 1, got '0'",
    ]
    assert problems_of(("--merged", "m")) == ["--merged: has no effect without --compare"]


def test_a_merged_model_that_is_an_adapter_or_missing_is_refused(base_model: Path, tmp_path: Path) -> None:
    assert check_merged(base_model) is None
    assert "is no directory" in str(check_merged(tmp_path / "no"))
    assert "has no config.json" in str(check_merged(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "not a merged model" in str(check_merged(tmp_path))


# ---- the tokens of a prompt


@pytest.mark.parametrize("family", ["chatml", "llama", "gemma", "mistral"])
def test_a_prompt_by_a_template_has_no_special_token_twice(family: str) -> None:
    tokenizer = make_tokenizer(family).tokenizer
    ids = encode(tokenizer, messages_of("Why?"))
    text = tokenizer.decode(ids)
    assert text == written(tokenizer, messages_of("Why?"))
    assert "Why?" in text
    assert ids.count(tokenizer.bos_token_id) == (0 if tokenizer.bos_token is None else 1)


def test_without_a_template_a_prompt_is_plain_text_after_one_bos_token() -> None:
    tokenizer = make_sentencepiece().tokenizer
    ids = encode(tokenizer, messages_of("One two"))
    assert tokenizer.decode(ids) == "<s> One two"
    assert encode(tokenizer, messages_of("<s>One two")).count(1) == 1


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt() -> None:
    plain = make_sentencepiece().tokenizer
    plain._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert plain("One")["input_ids"][-1] == 2
    assert encode(plain, messages_of("One"))[-1] != 2


def test_a_system_prompt_is_accepted_only_if_the_template_writes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    check_system(tokenizer, "  Be brief.\n")
    drops = make_tokenizer("chatml").tokenizer
    drops.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match=r"does not write a system prompt: 'Be brief\.'"):
        check_system(drops, "Be brief.")
    with pytest.raises(ModelError, match="does not write"):  # although these words are in every prompt
        check_system(drops, "Hello")
    drops.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(ModelError, match=r"refuses these messages \(system, user\): no system"):
        check_system(drops, "Be brief.")
    with pytest.raises(ModelError, match="no chat template"):
        check_system(make_sentencepiece().tokenizer, "Be brief.")


# ---- answers


def test_an_answer_equals_greedy_generation_by_transformers(model: PreTrainedModel, answerer: Answerer) -> None:
    ids = encode(answerer.tokenizer, messages_of(PROMPT))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    completion = answerer.complete(model, ids)
    assert completion.text == str(answerer.tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)).strip()
    assert (completion.num_new_tokens, completion.finish_reason) == (24, "length")
    assert answerer.answer(model, PROMPT) == completion.text


def test_an_answer_stops_at_each_end_token_with_a_reason(model: PreTrainedModel, answerer: Answerer) -> None:
    ids = encode(answerer.tokenizer, messages_of(PROMPT))
    written_ids = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()  # type: ignore[operator]
    end = written_ids[7]
    stopped = replace(answerer, end_ids={4, end}).complete(model, ids)
    assert (stopped.num_new_tokens, stopped.finish_reason) == (written_ids.index(end) + 1, "stop")


def test_sampling_repeats_with_the_seed_and_differs_with_another(model: PreTrainedModel, answerer: Answerer) -> None:
    def drawn(**how: float) -> str:
        return replace(answerer, sampling=AnswerSettings(temperature=1.0, **how)).answer(model, PROMPT)

    greedy = answerer.answer(model, PROMPT)
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1) != greedy
    assert drawn(seed=1, top_k=1) == greedy
    assert drawn(seed=1, top_p=1e-6) == greedy


def test_sampling_follows_the_flags_and_not_the_generation_config_of_the_model(
    base_model: Path, answerer: Answerer
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    draws = replace(answerer, sampling=AnswerSettings(temperature=1.5, seed=5))
    before = [each.answer(model, PROMPT) for each in (answerer, draws)]
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=1, top_p=0.1, min_p=0.9)
    assert [each.answer(model, PROMPT) for each in (answerer, draws)] == before


def test_a_model_in_training_mode_is_in_training_mode_after_an_answer(
    model: PreTrainedModel, answerer: Answerer
) -> None:
    model.train()
    answerer.answer(model, PROMPT)
    assert model.training
    model.eval()


def test_pieces_arrive_token_by_token_and_add_up_to_the_answer(model: PreTrainedModel, answerer: Answerer) -> None:
    pieces: list[str] = []
    watch = Watch(pieces.append, lambda: False)
    completion = answerer.complete(model, encode(answerer.tokenizer, messages_of(PROMPT)), watch)
    assert "".join(pieces) == completion.text
    assert len(pieces) > 10


def test_an_incomplete_character_is_withheld_until_it_is_complete() -> None:
    tokenizer = make_tokenizer("chatml").tokenizer
    ids = tokenizer("Größe 日本語 🙂 ", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    watch = Watch(pieces.append, lambda: False)
    watch.begin(lambda so_far: str(tokenizer.decode(so_far)).strip())
    for count in range(1, len(ids) + 1):
        assert not watch(torch.tensor([ids[:count]]), None).any()
    assert "".join(pieces) == "Größe 日本語 🙂"
    assert len(pieces) < len(ids), "no character of this text has several tokens"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stopped_answer_contains_what_was_generated(model: PreTrainedModel, answerer: Answerer) -> None:
    ids = encode(answerer.tokenizer, messages_of(PROMPT))
    pieces: list[str] = []
    stopped = answerer.complete(model, ids, Watch(pieces.append, lambda: len(pieces) >= 5))
    assert stopped.finish_reason == "interrupted"
    assert stopped.text == "".join(pieces)
    assert answerer.complete(model, ids).text.startswith(stopped.text)
    assert stopped.num_new_tokens < 24


# ---- shown


def test_the_verdict_names_the_answers_that_are_equal() -> None:
    base, adapter, merged = an_answer("a"), an_answer("b", "adapter"), an_answer("b", "merged")
    assert verdict([base, adapter, merged]) == "the answers differ: base / adapter = merged"
    assert verdict([adapter, merged]) == "the answers are the same"
    assert collect("p", [base]).differ is None
    assert collect("p", [base, adapter]).differ is True
    assert collect("p", [adapter, merged]).differ is False


def test_only_characters_that_control_a_terminal_are_escaped() -> None:
    assert escape_controls(HOSTILE) == "[bold]a[U+001B][2J[U+0007][U+009B]1m[U+202E]b\nc\td[U+000D]"
    assert escape_controls("Grüße\u00a0👩\u200d👧 नि\u200cक") == "Grüße\u00a0👩\u200d👧 नि\u200cक"


def a_report(*texts: str) -> GenerationReport:
    sources: tuple[Source, ...] = ("base", "adapter")
    answers = [an_answer(text, source) for text, source in zip(texts, sources, strict=False)]
    return GenerationReport(
        model="m", base_model="m", adapter=None, merged=None, answers=(collect("why\x1b?", answers),), notes=()
    )


def test_a_single_answer_is_raw_in_a_pipe_and_harmless_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_text.render_answers(a_report(HOSTILE))
    assert capsys.readouterr().out == HOSTILE + "\n"
    monkeypatch.setattr(answer_text, "to_terminal", lambda: True)
    answer_text.render_answers(a_report(HOSTILE))
    assert capsys.readouterr().out == escape_controls(HOSTILE) + "\n"
    printer = AnswerPrinter(is_headed=True, max_new_tokens=9)
    printer.begin("base")
    for character in HOSTILE:
        printer.text(character)
    printer.end(an_answer(HOSTILE))
    assert capsys.readouterr().out == f"base\n{escape_controls(HOSTILE)}\n"


def test_compared_answers_are_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    answer_text.render_answers(a_report(HOSTILE.strip(), "[/bold]" + "long " * 60))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]a[U+001B][2J" in out
    assert "[/bold]" + "long " * 59 in out  # whole lines
    assert out.endswith("the answers differ: base / adapter\n")


def test_a_truncated_answer_is_reported_with_the_reason() -> None:
    assert truncation_note(an_answer(), 3) is None
    assert truncation_note(an_answer(reason="interrupted"), 3) is None
    truncated = an_answer(reason="length")
    assert truncation_note(truncated, 3) == "the answer (base) was truncated after 3 tokens: --max-new-tokens"
    assert "no more positions" in str(truncation_note(truncated, 9))
    which = truncation_note(truncated, 3, prompt_name(2, 3))
    assert which == "the answer (base) to prompt 2 of 3 was truncated after 3 tokens: --max-new-tokens"
    assert prompt_name(1, 1) == ""
