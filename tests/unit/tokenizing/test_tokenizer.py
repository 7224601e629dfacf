"""Tokenizers: the pad token, added tokens, and ids without a row in the embedding."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, CTRLTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_cli.errors import MissingDependencyError, ModelError
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import ModelSettings
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer, check_vocabulary, load_tokenizer
from qlora_cli.tokenizing.vocabulary_files import unreadable_vocabulary

END = "</s>"
PAD = "<|pad|>"
TURN = "<turn>"


def write_tokenizer(directory: Path, *, tokens: Sequence[str] = (END,), **special: Any) -> int:
    """Write a byte-level tokenizer whose special tokens come first, and return its number of ids."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: index for index, token in enumerate([*tokens, *sorted(alphabet), "Ã©"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ã", "©")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(tokens))
    values = {"eos_token": END, "clean_up_tokenization_spaces": False, **special}
    PreTrainedTokenizerFast(tokenizer_object=backend, **values).save_pretrained(directory)
    return len(vocabulary)


def load(
    directory: Path,
    *,
    config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    **settings: Any,
) -> LoadedTokenizer:
    """Load the tokenizer in `directory`, together with these configs."""
    for name, values in (("config.json", config), ("generation_config.json", generation_config)):
        if values is not None:
            # AutoTokenizer looks for the family here.
            (directory / name).write_text(json.dumps({"model_type": "llama", **values}), encoding="utf-8")
    source = ModelSource(name="tiny", path=directory, base_name="tiny", tokenizer_path=directory)
    return load_tokenizer(source, ModelSettings(name="tiny", **settings))


def reload(tokenizer: PreTrainedTokenizerBase, directory: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(directory)
    again: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return again


def test_a_good_pad_token_is_retained_without_a_note(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokens=(END, PAD, TURN), pad_token=TURN)
    loaded = load(tmp_path, config={"vocab_size": 300, "eos_token_id": 0})
    assert loaded.tokenizer.pad_token == TURN
    assert loaded.notes == ()
    assert loaded.tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("pad", "config", "generation_config", "problem"),
    [
        (None, {}, {}, "has no pad token"),
        (END, {}, {}, "pads with </s>, which ends a text"),
        (TURN, {"eos_token_id": 1}, {}, "pads with <turn>, which ends a text"),
        (TURN, {}, {"eos_token_id": [0, 1]}, "pads with <turn>, which ends a text"),
        (TURN, {"text_config": {"eos_token_id": [0, 1]}}, {}, "pads with <turn>, which ends a text"),
        ("<far>", {"vocab_size": 260}, {}, "pads with <far> (id 260), beyond the 260 rows of the embedding"),
        ("<far>", {"text_config": {"vocab_size": 260}}, {}, "pads with <far> (id 260), beyond the 260 rows"),
    ],
)
def test_a_bad_pad_token_is_replaced_with_a_note_that_says_why(
    tmp_path: Path, pad: str | None, config: dict[str, Any], generation_config: dict[str, Any], problem: str
) -> None:
    num_ids = write_tokenizer(tmp_path, tokens=(END, TURN, PAD), pad_token=pad)
    assert num_ids == 260  # a pad token that is not one of them gets the next id
    loaded = load(tmp_path, config=config, generation_config=generation_config)
    assert loaded.tokenizer.pad_token == PAD
    (note,) = loaded.notes
    assert f"the tokenizer {problem}" in note
    assert "; padding with <|pad|> instead" in note


@pytest.mark.parametrize(
    ("tokens", "special", "config", "expected"),
    [
        (("<unk>", "<unused0>", "[PAD]", "<|finetune_right_pad_id|>"), {}, {}, "<|finetune_right_pad_id|>"),
        (("<unk>", "<unused0>", "<|endoftext|>", "[PAD]"), {}, {}, "[PAD]"),
        (("<unk>", "<unused0>", "<|endoftext|>"), {"unk_token": "<unk>"}, {}, "<|endoftext|>"),
        (("<unk>", "<unused0>", "<|endoftext|>"), {"unk_token": "<unk>"}, {"eos_token_id": [0, 3]}, "<unused0>"),
        (("<|reserved_special_token_1|>", "<|reserved_special_token_0|>"), {}, {}, "<|reserved_special_token_1|>"),
        (("<SPECIAL_20>",), {}, {}, "<SPECIAL_20>"),
        (("[control_8]",), {}, {}, "[control_8]"),
        (("<|placeholder1|>",), {}, {}, "<|placeholder1|>"),
        ((">>UNUSED_1<<",), {}, {}, ">>UNUSED_1<<"),
        (("<|im_start|>", "<extra>", "<unk>"), {"unk_token": "<unk>"}, {"pad_token_id": 2}, "<unk>"),
        (("<|im_start|>", "<extra>"), {"unk_token": END}, {"pad_token_id": 2}, "<extra>"),
        (("<|im_start|>", "<extra>"), {}, {"pad_token_id": -1}, "<|pad|>"),
        (("<|im_start|>", "<extra>"), {}, {"pad_token_id": 0}, "<|pad|>"),
    ],
)
def test_pads_are_preferred_in_this_order(
    tmp_path: Path, tokens: tuple[str, ...], special: dict[str, str], config: dict[str, Any], expected: str
) -> None:
    write_tokenizer(tmp_path, tokens=(END, *tokens), **special)
    loaded = load(tmp_path, config={"vocab_size": 300, **config})
    assert loaded.tokenizer.pad_token == expected
    assert loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id
    (note,) = loaded.notes
    assert f"padding with {expected}" in note
    again = reload(loaded.tokenizer, tmp_path / "saved")
    assert (again.pad_token, again.pad_token_id) == (expected, loaded.tokenizer.pad_token_id)


def test_a_token_beyond_the_embedding_is_skipped_for_one_within(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path, tokens=(END, "<unused0>"))
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": num_ids, "content": "<pad>"})
    path.write_text(json.dumps(values))
    assert load(tmp_path, config={"vocab_size": num_ids + 1}).tokenizer.pad_token_id == num_ids
    assert load(tmp_path, config={"vocab_size": num_ids}).tokenizer.pad_token_id == 1
    assert load(tmp_path, config={"vocab_size": num_ids}, resize_vocab=True).tokenizer.pad_token_id == num_ids


def test_a_chosen_pad_token_is_tokenized_equally_before_and_after_saving(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokens=(END, PAD))
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] = values["added_tokens"][:1]  # the pad token is an ordinary entry of the vocabulary
    path.write_text(json.dumps(values))
    tokenizer = load(tmp_path, config={"vocab_size": 300}).tokenizer
    again = reload(tokenizer, tmp_path / "saved")
    assert tokenizer("a<|pad|>")["input_ids"] == again("a<|pad|>")["input_ids"]


def test_a_pad_token_is_added_only_if_the_embedding_has_a_row_for_it(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path)
    roomy = load(tmp_path, config={"vocab_size": num_ids + 1})
    assert (roomy.tokenizer.pad_token, roomy.tokenizer.pad_token_id) == (PAD, num_ids)
    assert roomy.notes == (f"the tokenizer has no pad token; padding with <|pad|>, added as id {num_ids}",)
    check_vocabulary(roomy.tokenizer, num_ids + 1, ModelSettings(name="tiny"))
    full = load(tmp_path, config={"vocab_size": num_ids})
    assert full.tokenizer.pad_token == END
    assert len(full.tokenizer) == num_ids
    (note,) = full.notes
    assert "padding with its end token </s>, masked by position" in note
    assert "--resize-vocab" in note
    grown = load(tmp_path, config={"vocab_size": num_ids}, resize_vocab=True)
    assert grown.tokenizer.pad_token_id == num_ids


def test_no_token_is_added_if_the_number_of_rows_is_unknown(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path)
    assert len(load(tmp_path).tokenizer) == num_ids
    assert len(load(tmp_path, config={}).tokenizer) == num_ids


def test_the_end_token_of_a_padded_row_is_trained(tmp_path: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    num_ids = write_tokenizer(tmp_path)
    tokenizer = load(tmp_path, config={"vocab_size": num_ids}).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the last resort
    rows = [{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}, {"input_ids": [5], "labels": [5]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    assert batch["labels"].tolist() == [[-100, 6, 0], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_new_tokens_are_ordinary_single_tokens_also_after_saving(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path)
    loaded = load(tmp_path, config={"vocab_size": 300}, new_tokens="<think>,</think>")
    assert loaded.new_token_ids == (num_ids, num_ids + 1)
    assert f"new tokens: <think>, </think> (ids {num_ids}, {num_ids + 1})" in loaded.notes
    text = "a<think>b c</think>"
    for tokenizer in (loaded.tokenizer, reload(loaded.tokenizer, tmp_path / "saved")):
        ids = tokenizer(text)["input_ids"]
        assert (ids[1], ids[-1], len(ids)) == (num_ids, num_ids + 1, 6)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert loaded.tokenizer.pad_token_id == num_ids + 2


def test_new_tokens_match_as_written_whatever_the_tokenizer_normalizes(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "Lowercase"}}))
    tokenizer = load(tmp_path, new_tokens="<Think>").tokenizer
    assert tokenizer("<Think>")["input_ids"] == [num_ids]
    assert num_ids not in tokenizer("<think>")["input_ids"]


@pytest.mark.parametrize(
    ("new_tokens", "expected"),
    [
        ("<new>,<turn>", "<turn> is in the vocabulary already, as id 1"),
        ("é", "é is in the vocabulary already, as id 258"),  # which a byte-level vocabulary writes as Ã©
        ("<new>,<other>,<new>", "<new> is given twice"),
    ],
)
def test_an_invalid_new_token_is_named(tmp_path: Path, new_tokens: str, expected: str) -> None:
    write_tokenizer(tmp_path, tokens=(END, TURN))
    with pytest.raises(ModelError, match=expected):
        load(tmp_path, new_tokens=new_tokens)


def test_a_new_token_never_takes_the_id_of_another(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["Ã©"] = num_ids  # leaves a gap before it
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=f"would give it id {num_ids}, which another token has"):
        load(tmp_path, new_tokens="<new>")


def test_ids_beyond_the_embedding_are_refused_unless_it_may_be_extended(tmp_path: Path) -> None:
    num_ids = write_tokenizer(tmp_path)
    tokenizer = load(tmp_path, config={"vocab_size": num_ids}, new_tokens="<new>").tokenizer
    asked, unasked = ModelSettings(name="tiny", new_tokens="<new>"), ModelSettings(name="tiny")
    check_vocabulary(tokenizer, num_ids + 1, asked)
    for settings, cause in ((asked, "--new-tokens do not fit"), (unasked, "belongs to another model")):
        with pytest.raises(ModelError, match=f"ids up to {num_ids}, but the embedding only {num_ids} rows") as caught:
            check_vocabulary(tokenizer, num_ids, settings)
        assert cause in str(caught.value.hint)
        assert "--resize-vocab" in str(caught.value.hint)
    check_vocabulary(tokenizer, num_ids, ModelSettings(name="tiny", resize_vocab=True))


def test_the_tokenizer_may_be_in_another_directory_than_the_model(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    num_ids = write_tokenizer(base)
    write_tokenizer(adapter, tokens=(END, TURN), pad_token=TURN)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": num_ids, "eos_token_id": 1}))
    source = ModelSource(name="tiny", path=base, base_name="tiny", tokenizer_path=adapter)
    loaded = load_tokenizer(source, ModelSettings(name="tiny"))
    assert loaded.tokenizer.convert_tokens_to_ids(TURN) == 1
    assert "which ends a text" in loaded.notes[0]  # the base's config says so


def test_an_unusable_tokenizer_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    write_tokenizer(tmp_path / "endless", tokens=("<s>",), eos_token=None)
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1}))
    (slow / "merges.txt").write_text("#version: 0.2\n\n")
    CTRLTokenizer(str(slow / "vocab.json"), str(slow / "merges.txt")).save_pretrained(slow)
    coded = tmp_path / "coded"
    write_tokenizer(coded)
    path = coded / "tokenizer_config.json"
    automap = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | automap))
    for name, expected, hint in (
        ("none", "has no tokenizer that can be loaded", "save_pretrained"),
        ("endless", "has no eos token", "eos_token"),
        ("slow", "gives no character offsets", "fast tokenizer"),
        ("coded", "its own Python code, which is not run by default", "--trust-remote-code"),
    ):
        with pytest.raises(ModelError, match=expected) as caught:
            load(tmp_path / name)
        assert hint in str(caught.value.hint)


def test_code_of_the_tokenizer_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "coded"
    write_tokenizer(directory)
    (directory / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = directory / "tokenizer_config.json"
    automap = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | automap))
    assert type(load(directory, trust_remote_code=True).tokenizer).__name__ == "OwnTokenizer"


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_package_for_a_vocabulary_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    name = missing.rpartition(".")[2]
    with pytest.raises(MissingDependencyError, match=f"a SentencePiece vocabulary, which needs {name}") as caught:
        load(tmp_path)
    assert caught.value.hint == f"Run: pip install {name}"


def test_the_package_for_a_tiktoken_vocabulary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    (tmp_path / "own.tiktoken").write_text("IQ== 0\nIg== 1\n")
    assert "a tiktoken vocabulary, which needs tiktoken: not installed" in str(unreadable_vocabulary(tmp_path))


def test_a_pipe_named_like_a_vocabulary_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.tiktoken")
    assert unreadable_vocabulary(tmp_path) is None


def test_an_invalid_vocabulary_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"tokenizer\.model is not a vocabulary of SentencePiece or tiktoken"):
        load(tmp_path)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json can't be read as JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}', "is not a tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": []}', "is not a tokenizer"),
        ("tokenizer.json", "[]", "holds no JSON object"),
        ("tokenizer.json", "{", "can't be read as JSON"),
        ("tokenizer_config.json", '"text"', "holds no JSON object"),
        ("special_tokens_map.json", "[]", "holds no JSON object"),
    ],
)
def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path: Path, file: str, content: str, expected: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert f"{tmp_path / file} {expected}" in str(caught.value)
    assert f"Copy {file} again" in str(caught.value.hint)


def test_a_nonsensical_config_of_the_tokenizer_is_an_error_with_its_reason(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": 3}))
    with pytest.raises(ModelError, match="added_tokens_decoder is 3: AttributeError: 'int' object"):
        load(tmp_path)
