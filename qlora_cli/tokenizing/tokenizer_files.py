"""Open a tokenizer whose files come from the adapter or, where that has none, from the base.

An adapter may have all of the files, only a chat template, or none. The vocabulary comes from one directory; config
and chat template come from the first directory that has one. Differences from the base's own tokenizer are noted.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.construction import faulty_keys, shown
from qlora_cli.model_files.given_model import CONFIG, VOCABULARY, has_vocabulary
from qlora_cli.model_files.source import ModelSource
from qlora_cli.tokenizing.chat_template import Templates, read_templates
from qlora_cli.tokenizing.tokenizer_limits import check_tokenizer_files
from qlora_cli.writing import copy_file, escapes_directory

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
KEYED = (SPECIAL_TOKENS, TOKENIZER_CONFIG, ADDED_TOKENS)  # files that accompany a vocabulary
MOST_NAMED = 3


def tokenizer_directories(source: ModelSource) -> tuple[Path, ...]:
    """Return the directories that files of the tokenizer may be in: the adapter's first, the base's last."""
    return tuple(dict.fromkeys((source.adapter or source.tokenizer_path, source.path)))


def open_tokenizer(
    source: ModelSource, *, trust_remote_code: bool, has_template_choice: bool, num_rows: int
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer of a model or an adapter with its chat template, and notes on differences from the base's.

    With `has_template_choice` nothing is noted on the template: the user's choice replaces it, and is noted.
    `num_rows` is the number of ids that the base has a row for, or may be extended to.

    Raises:
        Exception: whatever transformers raises for damaged or missing files.
        ModelError: a chat template can't be read, or is not valid Jinja2; or a file demands too much.
    """
    directories = tokenizer_directories(source)
    for directory in directories:
        check_tokenizer_files(directory)
    with _merged_files(directories) as directory:
        tokenizer = _open_and_try(directory, trust_remote_code=trust_remote_code)
    vocabulary = _vocabulary_directory(directories)
    tokenizer.name_or_path = str(vocabulary)
    known = tokenizer.get_vocab().keys()  # tokens from an added_tokens.json have their own note
    notes = _add_tokens_of_files(
        tokenizer, (*_before(vocabulary, directories), vocabulary), base=source.path, num_rows=num_rows
    )
    template_notes = _set_template(tokenizer, source, directories, checks=not has_template_choice)
    notes += [] if has_template_choice else template_notes
    if len(directories) > 1 and (owner := _tokenizer_name(directories[0])) is not None:
        of_base = _tokenizer_of_base(directories[-1], num_rows, trust_remote_code=trust_remote_code)
        notes += [of_base] if isinstance(of_base, str) else _differences(tokenizer, of_base, owner, known)
    return tokenizer, notes


def _open_and_try(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `directory` after a trial: some of its content is first used on a text.

    Raises:
        Exception: whatever transformers raises over files that are damaged or missing.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    encoded = tokenizer("text")
    if tokenizer.model_input_names[0] not in encoded:  # batches are padded by it
        raise ValueError(f"the tokenizer does not return {tokenizer.model_input_names[0]}")
    # It is saved with the adapter; a lone surrogate can't be encoded.
    json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode("utf-8")
    return tokenizer


def _vocabulary_directory(directories: Sequence[Path]) -> Path:
    return next((directory for directory in directories if has_vocabulary(directory)), directories[-1])


def _before(directory: Path, directories: Sequence[Path]) -> Sequence[Path]:
    return directories[: directories.index(directory)]


def _as_config(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the content of a special_tokens_map.json to that of a tokenizer_config.json."""
    return {
        key: {"__type": "AddedToken", **value} if isinstance(value, Mapping) else value
        for key, value in special_tokens.items()
    }


@contextmanager
def _merged_files(directories: Sequence[Path]) -> Iterator[Path]:
    """Yield a directory with all files of the tokenizer: the one that has them all, or a temporary copy."""
    vocabulary = _vocabulary_directory(directories)
    configs = [directory for directory in directories if (directory / TOKENIZER_CONFIG).is_file()]
    config = configs[0] if configs else vocabulary
    special = next(
        (directory for directory in _before(config, directories) if (directory / SPECIAL_TOKENS).is_file()), config
    )
    if vocabulary == config == special:
        yield vocabulary
        return
    content: dict[str, Any] = {}
    for directory in reversed(configs) if config in _before(vocabulary, directories) else configs[:1]:
        content |= read_json(directory / TOKENIZER_CONFIG)
        if "added_tokens_decoder" not in content and (directory / SPECIAL_TOKENS).is_file():  # as transformers does
            content |= _as_config(read_json(directory / SPECIAL_TOKENS))
    if special != config:
        content |= _as_config(read_json(special / SPECIAL_TOKENS))
    with TemporaryDirectory(prefix="qlora-tokenizer-") as name:
        _assemble(Path(name), vocabulary, config, directories[-1], content)
        yield Path(name)


def _assemble(target: Path, vocabulary: Path, config: Path, base: Path, content: Mapping[str, Any]) -> None:
    """Assemble a tokenizer in `target` with the config `content` and the code from the directory `config`."""
    code = [path.name for path in config.glob("*.py")] if "auto_map" in content else []
    for directory, files in ((vocabulary, VOCABULARY), (base, (CONFIG,)), (config, code)):
        _copy_files(directory, target, files)
    (target / TOKENIZER_CONFIG).write_text(json.dumps(content), encoding="utf-8")


def _copy_files(directory: Path, target: Path, files: Iterable[str]) -> None:
    for file in files:
        if (directory / file).is_file():
            if escapes_directory(directory / file):
                raise ModelError(
                    f"{directory / file} is a link out of its directory, and is not followed",
                    hint="Replace it by a copy of its target, if you trust that.",
                )
            copy_file(directory / file, target / file)


def faulty_config(
    source: ModelSource, error: Exception, *, trust_remote_code: bool
) -> tuple[Path, str, object] | None:
    """Return the config file, key and value that cause `error`; None if they are not found."""
    if trust_remote_code:
        return None
    directories = tokenizer_directories(source)
    with TemporaryDirectory(prefix="qlora-tokenizer-") as name:
        copies = {directory: Path(name) / str(number) for number, directory in enumerate(directories)}
        for directory, copy in copies.items():
            copy.mkdir()
            _copy_files(directory, copy, (*VOCABULARY, CONFIG, *KEYED))
        files = (directory / file for file in KEYED for directory in directories if (directory / file).is_file())
        for file in files:
            content = read_json(file)
            if key := _faulty_key(content, error, copies[file.parent] / file.name, tuple(copies.values())):
                return file, key, content[key]
    return None


def _faulty_key(content: Mapping[str, Any], error: Exception, file: Path, directories: Sequence[Path]) -> str | None:
    """Return the key of `file`, with this `content`, without which the files in `directories` form a tokenizer."""

    def builds(changed: Mapping[str, Any]) -> None:
        file.write_text(json.dumps(changed), encoding="utf-8")
        with _merged_files(directories) as directory:
            _open_and_try(directory, trust_remote_code=False)

    keys = faulty_keys(content, content, error, builds)
    file.write_text(json.dumps(content), encoding="utf-8")
    return keys[0] if keys else None


def _add_tokens_of_files(
    tokenizer: PreTrainedTokenizerBase, directories: Sequence[Path], *, base: Path, num_rows: int
) -> list[str]:
    """Add the tokens of each added_tokens.json that the tokenizer lacks; return notes on them.

    transformers reads that file only next to a config of its age. If two of `directories` list a token or an id, the
    first wins. The base's file may be older than its weights: tokens without a row are skipped.
    """
    if not any(_listed(directory) for directory in directories):
        return []
    known = tokenizer.get_vocab()
    results: list[tuple[Path, str, object, str]] = []
    to_add: dict[int, tuple[str, Path]] = {}
    taken = set(known)
    for directory in directories:
        for token, number in _listed(directory).items():
            if token in taken:
                continue
            if type(number) is not int:
                results.append((directory, token, number, "whose id is not a whole number"))
            elif number in to_add:
                results.append((directory, token, number, "whose id is given to another token"))
            elif directory == base and number >= num_rows:
                results.append((directory, token, number, f"beyond the {num_rows:,} rows of the embedding"))
            else:
                to_add[number] = (token, directory)
                taken.add(token)
    next_id = _next_id(tokenizer, known)
    for number, (token, directory) in sorted(to_add.items()):
        if number != next_id:
            why = "whose id does not follow the last one"
        else:
            why = "" if tokenizer.add_tokens([AddedToken(token, normalized=False)]) else "that can't be added"
            next_id += not why
        results.append((directory, token, number, why))
    return [note for directory in directories for note in _notes_on_added(directory / ADDED_TOKENS, results)]


def _listed(directory: Path) -> Mapping[str, Any]:
    file = directory / ADDED_TOKENS
    return read_json(file) if file.is_file() else {}


def _next_id(tokenizer: PreTrainedTokenizerBase, known: Mapping[str, int]) -> int | None:
    """Return the id that the next added token gets; None if it is not the one after the last of `known`."""
    size, last_added = tokenizer.vocab_size, max(tokenizer.added_tokens_decoder, default=-1)
    next_id = last_added + 1 if last_added >= size else size  # the library does not fill gaps
    return next_id if next_id == max(known.values(), default=-1) + 1 else None


def _notes_on_added(file: Path, results: Sequence[tuple[Path, str, object, str]]) -> Iterator[str]:
    """Yield notes on the tokens of an added_tokens.json: those added, and those skipped with the reason."""
    of_file = [(token, number, why) for directory, token, number, why in results if directory == file.parent]
    for reason in dict.fromkeys(why for *_, why in of_file):
        named = _named([(token, number) for token, number, why in of_file if why == reason], reason)
        yield f"{file} names {named}; skipped" if reason else f"{file} adds {named}"


def _set_template(
    tokenizer: PreTrainedTokenizerBase, source: ModelSource, directories: Sequence[Path], *, checks: bool
) -> list[str]:
    """Set the first chat template of `directories` in `tokenizer`; return a note if base and adapter differ in it.

    With `checks` the template must be valid Jinja2, since no other will replace it.
    """
    available = [(directory, read_templates(directory)) for directory in directories]
    chosen = next(((directory, templates) for directory, templates in available if templates is not None), None)
    if chosen is None:
        return []
    directory, templates = chosen
    if checks:
        templates.check()
    if len(directories) == 1 and not templates.belongs_to_processor:
        return []  # transformers has read it
    tokenizer.chat_template = templates.text
    if len(directories) == 1:
        return [f"chat template read from {templates.file}"]
    return _note_on_template(source, directory, templates, available[-1][1])


def _note_on_template(source: ModelSource, directory: Path, chosen: Templates, of_base: Templates | None) -> list[str]:
    if directory == source.path:
        if not has_vocabulary(tokenizer_directories(source)[0]):
            return []  # the whole tokenizer is the base's
        return [f"chat template: that of the base ({chosen.file}); the adapter's tokenizer has none"]
    if of_base is None:
        return [f"chat template: the adapter's ({chosen.file}); the base has none"]
    if of_base.text != chosen.text:
        return [f"chat template: the adapter's ({chosen.file}), not that of the base"]
    return []


def _tokenizer_name(adapter: Path) -> str | None:
    """Return a name for the tokenizer that files of `adapter` define or change; None if they do not."""
    if has_vocabulary(adapter):
        return "the adapter's tokenizer"
    files = [file for file in KEYED if (adapter / file).is_file()]
    return f"the tokenizer, by the adapter's {' and '.join(files)}," if files else None


def _tokenizer_of_base(base: Path, num_rows: int, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | str:
    """Return the tokenizer of the base, which the adapter's replaces, or a note on why there is none."""
    if not has_vocabulary(base):
        return "the tokenizer is the adapter's; the base has none"
    try:
        of_base = _open_and_try(base, trust_remote_code=trust_remote_code)
        _add_tokens_of_files(of_base, [base], base=base, num_rows=num_rows)
    except Exception as error:  # noqa: BLE001 - tokenizers raises a bare Exception for a damaged file; it is not used
        return f"the tokenizer is the adapter's; that of the base can't be read: {str(error).splitlines()[0]}"
    return of_base


def _differences(
    tokenizer: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase, name: str, known: Collection[str]
) -> list[str]:
    """Return notes on how `tokenizer`, called `name`, differs from the base's.

    Compared are the tokens gained (only those `known` to be its own), lost and moved, and the special tokens.
    """
    ours: dict[str, int] = tokenizer.get_vocab()
    theirs: dict[str, int] = of_base.get_vocab()
    gained = {token: number for token, number in ours.items() if token not in theirs and token in known}
    lost = {token: number for token, number in theirs.items() if token not in ours}
    moved = {token: number for token, number in ours.items() if theirs.get(token, number) != number}
    special = list(_special_differences(tokenizer, of_base))
    return [
        *([f"{name} has {_named(_by_id(gained), 'more than the base')}"] if gained else []),
        *([f"{name} lacks {_named(_by_id(lost), 'of the base')}"] if lost else []),
        *([f"{name} has {_named(_by_id(moved), 'with another id than in the base')}"] if moved else []),
        *([f"{name} has other special tokens than the base: {', '.join(special)}"] if special else []),
    ]


def _special_differences(tokenizer: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield a description of each special token that differs from the base's.

    A base without a pad token, or that pads with its end token, gets another whenever it is trained.
    """
    ours, theirs = tokenizer.special_tokens_map, of_base.special_tokens_map
    for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token, base_token = ours.get(role), theirs.get(role)
        if token != base_token and not (role == "pad_token" and base_token in {None, of_base.eos_token}):
            yield f"{role} is {_quoted(token)}, not {_quoted(base_token)}"


def _quoted(token: object) -> str:
    return "none" if token is None else repr(str(token))


def _by_id(tokens: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(tokens.items(), key=lambda one: one[1])


def _named(tokens: Sequence[tuple[str, object]], how: str = "") -> str:
    listed = ", ".join(f"{token!r} (id {shown(number)})" for token, number in tokens[:MOST_NAMED])
    more = f" and {len(tokens) - MOST_NAMED:,} more" if len(tokens) > MOST_NAMED else ""
    counted = f"{len(tokens):,} token{'s' if len(tokens) > 1 else ''} {how}".strip()
    return f"{counted}: {listed}{more}"


def notes_on_unused_templates(source: ModelSource, others: Sequence[ModelSource], template: object) -> list[str]:
    """Return notes on the chat templates of `others` that a model merged from `source` and them does not use."""
    return [
        f"chat template: that of {source.name}; the one of {other.name} ({templates.file}) is not used"
        for other in others
        if other.adapter is not None
        and (templates := read_templates(other.adapter)) is not None
        and templates.text != template
    ]
