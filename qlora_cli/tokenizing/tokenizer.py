"""Load the tokenizer of a model: with new tokens, chat template, and a pad token that does not end a text."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError, QloraError
from qlora_cli.model_files.checkpoint import how_to_restore, read_json
from qlora_cli.model_files.construction import reason_of, shown
from qlora_cli.model_files.generation import read_generation_config
from qlora_cli.model_files.given_model import CONFIG, has_vocabulary
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import ModelSettings
from qlora_cli.tokenizing.chat_template import choose_chat_template
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors
from qlora_cli.tokenizing.tokenizer_files import faulty_config, open_tokenizer, tokenizer_directories
from qlora_cli.tokenizing.vocabulary_files import unreadable_vocabulary

# Tokens that tokenizers have for padding, best first. <|endoftext|> is excluded where it ends the text.
PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<\uff5c\u2581pad\u2581\uff5c>",  # DeepSeek
    "<|endoftext|>",
    "<|vision_pad|>",
)
# Reserved tokens, as model families name them: <|reserved_special_token_0|>, <unused0>,
# [unused1], >>UNUSED_1<<, <|placeholder1|>, <|dummy_0|>, <|extra_0|>, <extra_id_0>, <SPECIAL_20>, [control_8].
RESERVED = re.compile(
    r"(<|\[|>>)\|?(reserved|unused|placeholder|dummy|extra|special|control)[a-z_]*\d+\|?(>|\]|<<)", re.IGNORECASE
)
ADDED_PAD = "<|pad|>"
VALUE_TYPES: Mapping[str, tuple[type, ...]] = {
    "added_tokens.json": (int,),
    "special_tokens_map.json": (str, list, dict),
}
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer that pads on the right.

    `end_ids` end generation; `new_token_ids` are the ids of the new tokens, in their order.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    new_token_ids: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """The rows that an embedding needs for this tokenizer."""
        return _largest_id(self.tokenizer) + 1


@dataclass(frozen=True, kw_only=True)
class _VocabularyFacts:
    """Facts from the model's files: the rows of the embedding, the ids that end a text, and those for padding."""

    num_rows: int | None
    end_ids: frozenset[int]
    pad_ids: tuple[int, ...]


def load_tokenizer(source: ModelSource, settings: ModelSettings) -> LoadedTokenizer:
    """Return the tokenizer with new tokens, chat template and pad token by the settings, and notes on them.

    Raises:
        ModelError: there is no tokenizer, it has no end-of-sequence token, or it can't give the offsets of
            its tokens in the text, which the loss mask is built from; a new token can't be added; or the
            requested chat template can't be used.
        MissingDependencyError: its vocabulary needs a package that is not installed.
    """
    with explain_tokenizer_errors(source.name):
        return _load(source, settings)


def _load(source: ModelSource, settings: ModelSettings) -> LoadedTokenizer:
    facts = _read_facts(source)
    tokenizer, differences = _open(source, settings, sys.maxsize if settings.resize_vocab else facts.num_rows or 0)
    tokenizer.padding_side = "right"
    new_token_ids = _add_new_tokens(tokenizer, settings.new_tokens or ())
    notes = []
    if new_token_ids:
        ids = ", ".join(map(str, new_token_ids))
        notes.append(f"new tokens: {', '.join(settings.new_tokens or ())} (ids {ids})")
    notes += choose_chat_template(tokenizer, settings.chat_template)
    if source.adapter is not None and facts.num_rows is not None:
        # The base of an adapter is extended to its tokenizer's size, as it was in training.
        facts = replace(facts, num_rows=max(facts.num_rows, _largest_id(tokenizer) + 1))
    notes += _choose_pad(tokenizer, facts, may_grow=settings.resize_vocab)
    assert tokenizer.eos_token_id is not None, "checked on opening"
    return LoadedTokenizer(
        tokenizer=tokenizer,
        end_ids=facts.end_ids | {tokenizer.eos_token_id},
        new_token_ids=new_token_ids,
        notes=(*notes, *differences),
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int, settings: ModelSettings) -> None:
    """Check that every id of the tokenizer has a row in the embedding, unless the embedding may be resized.

    Raises:
        ModelError: an id is beyond the embedding.
    """
    largest = _largest_id(tokenizer)
    if largest < num_rows or settings.resize_vocab:
        return
    cause = (
        "--new-tokens do not fit"
        if settings.new_tokens
        else "The tokenizer belongs to another model, or has additions"
    )
    tokens = _describe_tokens_from(tokenizer, num_rows)
    raise ModelError(
        f"the tokenizer of {settings.name} has ids up to {largest}, but the embedding only {num_rows} rows",
        hint=f"{cause}: {tokens} without a row; --resize-vocab extends the embedding.",
    )


def _open(source: ModelSource, settings: ModelSettings, num_rows: int) -> tuple[PreTrainedTokenizerBase, list[str]]:
    try:
        tokenizer, notes = open_tokenizer(
            source,
            trust_remote_code=settings.trust_remote_code,
            has_template_choice=settings.chat_template is not None,
            num_rows=num_rows,
        )
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise _opening_error(source, error, trust_remote_code=settings.trust_remote_code) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {source.name} ({type(tokenizer).__name__}) gives no character offsets",
            hint="Convert it to a tokenizer.json (a fast tokenizer).",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source.name} has no eos token, so the model could never learn to stop",
            hint="Set eos_token in tokenizer_config.json.",
        )
    return tokenizer, notes


def _opening_error(source: ModelSource, error: Exception, *, trust_remote_code: bool) -> QloraError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"the tokenizer of {source.name} comes with its own Python code, which is not run by default",
            hint="Read the code; if you trust its author, give --trust-remote-code.",
        )
    for directory in tokenizer_directories(source):
        _check_files(directory)
        if (unreadable := unreadable_vocabulary(directory)) is not None:
            return unreadable
    reason = reason_of(error)
    if faulty := faulty_config(source, error, trust_remote_code=trust_remote_code):
        file, key, value = faulty
        return ModelError(
            f"{file} is not a valid tokenizer file: {key} is {shown(value)}: {reason}",
            hint=f"Correct it there, or download it again. {how_to_restore(file.parent, file.name)}",
        )
    hint = "Save one next to the weights with tokenizer.save_pretrained()."
    if has_vocabulary(source.tokenizer_path):
        hint = "Download its files again from where the model came from, all of one version."
    return ModelError(f"{source.name} has no tokenizer that can be loaded: {reason}", hint=hint)


def _check_files(directory: Path) -> None:
    """Check the JSON files of a tokenizer, to name the first that is damaged.

    Raises:
        ModelError: one is.
    """
    for file in JSON_FILES:
        path = directory / file
        for key, value in read_json(path).items() if path.is_file() else ():
            if not isinstance(value, VALUE_TYPES.get(file, object)):
                raise ModelError(
                    f"{path} is not a valid tokenizer file: {key} is {shown(value)}",
                    hint=how_to_restore(directory, file),
                )
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ModelError(
                f"{path} is not a tokenizer: {error}", hint=how_to_restore(directory, path.name)
            ) from error


def _add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Add `tokens` as ordinary tokens, which decoding keeps, matched in the text verbatim."""
    vocabulary = tokenizer.get_vocab()  # listed once: a large one takes a twentieth of a second
    for index, token in enumerate(tokens):
        if token in tokens[:index]:
            raise ModelError(f"the new token {token} is given twice", hint="Name each of --new-tokens once.")
        known = _known_id(tokenizer, token, vocabulary)
        if known is not None:
            raise ModelError(
                f"the new token {token} is in the vocabulary already, as id {known}",
                hint="Leave it out of --new-tokens.",
            )
    used = set(vocabulary.values())
    return tuple(_add(tokenizer, token, used, special=False) for token in tokens)


def _known_id(tokenizer: PreTrainedTokenizerBase, token: str, vocabulary: Mapping[str, int]) -> int | None:
    # Vocabularies encode some characters: a byte-level one has "cafÃ©" for "café".
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) == 1 and tokenizer.decode(ids) == token:
        return int(ids[0])
    return vocabulary.get(token)


def _add(tokenizer: PreTrainedTokenizerBase, token: str, used: set[int], *, special: bool) -> int:
    """Add a token, whose id joins those that are `used`."""
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int), "one token has one id"
    if token_id in used:  # the library derives the next id from the number of tokens
        raise ModelError(
            f"{token} can't be added: the tokenizer would give it id {token_id}, which another token has",
            hint="The ids of the tokenizer have gaps; add the tokens to its tokenizer.json.",
        )
    used.add(token_id)
    return token_id


def _read_facts(source: ModelSource) -> _VocabularyFacts:
    config = source.path / CONFIG
    files = (read_json(config) if config.is_file() else {}, read_generation_config(source.path))
    texts = [part for values in files for part in (values, values.get("text_config")) if isinstance(part, dict)]
    rows = [int(text["vocab_size"]) for text in texts if isinstance(text.get("vocab_size"), int)]
    return _VocabularyFacts(
        num_rows=rows[-1] if rows else None,  # that of the text config, if there is one
        end_ids=frozenset(token_id for text in texts for token_id in _as_ids(text.get("eos_token_id"))),
        pad_ids=tuple(token_id for text in texts for token_id in _as_ids(text.get("pad_token_id"))),
    )


def _as_ids(value: Any) -> list[int]:
    """Return the ids in a config's field: one, several or none; some configs write -1 for none."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and item >= 0]


def _choose_pad(tokenizer: PreTrainedTokenizerBase, facts: _VocabularyFacts, *, may_grow: bool) -> list[str]:
    """Keep the pad token if it is suitable, else set another and return a note on it."""
    ends = facts.end_ids | {tokenizer.eos_token_id}
    limit = sys.maxsize if may_grow else facts.num_rows or _largest_id(tokenizer) + 1
    problem = _pad_problem(tokenizer, ends, limit)
    if problem is None:
        return []
    vocabulary = tokenizer.get_vocab()
    for token in _pad_candidates(tokenizer, facts.pad_ids):
        token_id = vocabulary.get(token)
        if token_id is not None and token_id not in ends and token_id < limit:
            tokenizer.add_special_tokens({"pad_token": token})
            return [f"the tokenizer {problem}; padding with {token} instead"]
    if _largest_id(tokenizer) + 1 < limit and ADDED_PAD not in vocabulary:
        token_id = _add(tokenizer, ADDED_PAD, set(vocabulary.values()), special=True)
        tokenizer.pad_token = ADDED_PAD
        return [f"the tokenizer {problem}; padding with {ADDED_PAD}, added as id {token_id}"]
    # Harmless for training: padding is masked by position, so a real end token is still trained.
    tokenizer.pad_token = tokenizer.eos_token
    return [
        f"the tokenizer {problem}, and has no token to spare; padding with its end token {tokenizer.eos_token}, "
        "masked by position (--resize-vocab adds a row for a pad token)"
    ]


def _pad_problem(tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], limit: int) -> str | None:
    token, token_id = tokenizer.pad_token, tokenizer.pad_token_id
    if token is None or token_id is None:
        return "has no pad token"
    if token_id in ends:
        return f"pads with {token}, which ends a text"
    if token_id >= limit:
        return f"pads with {token} (id {token_id}), beyond the {limit} rows of the embedding"
    return None


def _pad_candidates(tokenizer: PreTrainedTokenizerBase, config_pad_ids: tuple[int, ...]) -> Iterator[str]:
    """Yield candidates for padding, best first; some may be missing from the vocabulary or in use."""
    yield from PAD_TOKENS
    reserved = [(token_id, token) for token, token_id in tokenizer.get_vocab().items() if RESERVED.fullmatch(token)]
    yield from (token for _, token in sorted(reserved))
    if tokenizer.unk_token is not None:
        yield tokenizer.unk_token
    for token_id in config_pad_ids:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, str):
            yield token


def _describe_tokens_from(tokenizer: PreTrainedTokenizerBase, first: int) -> str:
    """Describe the tokens with ids from `first` on."""
    names = [
        token for token, number in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1]) if number >= first
    ]
    more = f" and {len(names) - 1:,} more are" if len(names) > 1 else " is"
    return f"{names[0]!r}{more}"


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=0)
