"""The files of a tokenizer, each from the adapter, else from the base.

An adapter may bring all of them, a chat template alone, or nothing. The vocabulary is that of one place; config and
chat template come from the nearest place that has one. Whatever differs from the base's own is said.
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
from qlora_cli.writing import copy_file, leads_out

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
KEYED = (SPECIAL_TOKENS, TOKENIZER_CONFIG, ADDED_TOKENS)  # what goes with a vocabulary
MOST_NAMED = 3


def places_of(source: ModelSource) -> tuple[Path, ...]:
    """Return where files of the tokenizer may lie, the nearest first; the base comes last."""
    return tuple(dict.fromkeys((source.adapter or source.tokenizer_path, source.path)))


def open_tokenizer(
    source: ModelSource, *, trust_remote_code: bool, is_template_asked: bool, num_rows: int
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer of a model or an adapter with its chat template, and notes on what is not the base's.

    Nothing is said of the template if `is_template_asked`: another one is asked for, which is said. `num_rows` is how
    many ids the base has a row for, or may be given one.

    Raises:
        Exception: whatever transformers raises over files that are damaged or missing.
        ModelError: a chat template can't be read, or is not written in Jinja2; or a file asks for too much.
    """
    places = places_of(source)
    for place in places:
        check_tokenizer_files(place)
    with _together(places) as directory:
        tokenizer = _opened(directory, trust_remote_code=trust_remote_code)
    vocabulary = _place_of_vocabulary(places)
    tokenizer.name_or_path = str(vocabulary)
    known = tokenizer.get_vocab().keys()  # what an added_tokens.json adds is said of that file
    notes = _add_listed(tokenizer, (*_before(vocabulary, places), vocabulary), base=source.path, num_rows=num_rows)
    on_template = _take_template(tokenizer, source, places, checks=not is_template_asked)
    notes += [] if is_template_asked else on_template
    if len(places) > 1 and (whose := _whose(places[0])) is not None:
        of_base = _tokenizer_of_base(places[-1], num_rows, trust_remote_code=trust_remote_code)
        notes += [of_base] if isinstance(of_base, str) else _differences(tokenizer, of_base, whose, known)
    return tokenizer, notes


def _opened(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `directory` after a trial: some of what its files hold is first used on a text.

    Raises:
        Exception: whatever transformers raises over files that are damaged or missing.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    encoded = tokenizer("text")
    if tokenizer.model_input_names[0] not in encoded:  # by which batches are padded
        raise ValueError(f"{tokenizer.model_input_names[0]} is nothing that it makes of a text")
    # It is saved with the adapter; half a character can't be written.
    json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode("utf-8")
    return tokenizer


def _place_of_vocabulary(places: Sequence[Path]) -> Path:
    return next((place for place in places if has_vocabulary(place)), places[-1])


def _before(place: Path, places: Sequence[Path]) -> Sequence[Path]:
    return places[: places.index(place)]


def _as_config(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a special_tokens_map.json holds as a tokenizer_config.json writes it."""
    return {
        key: {"__type": "AddedToken", **value} if isinstance(value, Mapping) else value
        for key, value in special_tokens.items()
    }


@contextmanager
def _together(places: Sequence[Path]) -> Iterator[Path]:
    """Yield a directory with the files of one tokenizer: the one that has them all, or copies for as long."""
    vocabulary = _place_of_vocabulary(places)
    configs = [place for place in places if (place / TOKENIZER_CONFIG).is_file()]
    config = configs[0] if configs else vocabulary
    special = next((place for place in _before(config, places) if (place / SPECIAL_TOKENS).is_file()), config)
    if vocabulary == config == special:
        yield vocabulary
        return
    content: dict[str, Any] = {}
    for place in reversed(configs) if config in _before(vocabulary, places) else configs[:1]:
        content |= read_json(place / TOKENIZER_CONFIG)
        if "added_tokens_decoder" not in content and (place / SPECIAL_TOKENS).is_file():  # as transformers does
            content |= _as_config(read_json(place / SPECIAL_TOKENS))
    if special != config:
        content |= _as_config(read_json(special / SPECIAL_TOKENS))
    with TemporaryDirectory(prefix="qlora-tokenizer-") as name:
        _copy(Path(name), vocabulary, config, places[-1], content)
        yield Path(name)


def _copy(target: Path, vocabulary: Path, config: Path, base: Path, content: Mapping[str, Any]) -> None:
    """Put a tokenizer together in `target`, whose config is `content`, and whose code is next to `config`."""
    code = [path.name for path in config.glob("*.py")] if "auto_map" in content else []
    for place, files in ((vocabulary, VOCABULARY), (base, (CONFIG,)), (config, code)):
        _copy_files(place, target, files)
    (target / TOKENIZER_CONFIG).write_text(json.dumps(content), encoding="utf-8")


def _copy_files(place: Path, target: Path, files: Iterable[str]) -> None:
    for file in files:
        if (place / file).is_file():
            if leads_out(place / file):
                raise ModelError(
                    f"{place / file} is a link out of its directory, and is not followed",
                    hint="Put a copy of what it leads to in its place, if you trust it.",
                )
            copy_file(place / file, target / file)


def faulty_config(
    source: ModelSource, error: Exception, *, trust_remote_code: bool
) -> tuple[Path, str, object] | None:
    """Return the file of keys and values that `error` comes from, with key and value; None if it is not found."""
    if trust_remote_code:
        return None
    places = places_of(source)
    with TemporaryDirectory(prefix="qlora-tokenizer-") as name:
        copies = {place: Path(name) / str(number) for number, place in enumerate(places)}
        for place, copy in copies.items():
            copy.mkdir()
            _copy_files(place, copy, (*VOCABULARY, CONFIG, *KEYED))
        files = (place / file for file in KEYED for place in places if (place / file).is_file())
        for file in files:
            content = read_json(file)
            if key := _faulty_key(content, error, copies[file.parent] / file.name, tuple(copies.values())):
                return file, key, content[key]
    return None


def _faulty_key(content: Mapping[str, Any], error: Exception, file: Path, places: Sequence[Path]) -> str | None:
    """Return the key of `file`, which holds `content`, without which the files in `places` make a tokenizer."""

    def builds(changed: Mapping[str, Any]) -> None:
        file.write_text(json.dumps(changed), encoding="utf-8")
        with _together(places) as directory:
            _opened(directory, trust_remote_code=False)

    keys = faulty_keys(content, content, error, builds)
    file.write_text(json.dumps(content), encoding="utf-8")
    return keys[0] if keys else None


def _add_listed(tokenizer: PreTrainedTokenizerBase, places: Sequence[Path], *, base: Path, num_rows: int) -> list[str]:
    """Add the tokens of each added_tokens.json that the tokenizer lacks; return notes on them.

    transformers reads that file only with a config of its own age. A token or an id that two of `places` name is
    that of the first. Beside the base the file may be older than its weights: what has no row there is left out.
    """
    known = tokenizer.get_vocab()
    refused: list[tuple[Path, str, object, str]] = []
    wanted: dict[int, tuple[str, Path]] = {}
    taken = set(known)
    for place in places:
        for token, number in _listed(place).items():
            if token in taken:
                continue
            if type(number) is not int:
                refused.append((place, token, number, "whose id is no whole number"))
            elif number in wanted:
                refused.append((place, token, number, "whose id is given to another token"))
            elif place == base and number >= num_rows:
                refused.append((place, token, number, f"beyond the {num_rows:,} rows of the embedding"))
            else:
                wanted[number] = (token, place)
                taken.add(token)
    following = _following(tokenizer, known)
    for number, (token, place) in sorted(wanted.items()):
        if number != following:
            why = "whose id does not follow the last one"
        else:
            why = "" if tokenizer.add_tokens([AddedToken(token, normalized=False)]) else "that can't be added"
            following += not why
        refused.append((place, token, number, why))
    return [note for place in places for note in _on_listed(place / ADDED_TOKENS, refused)]


def _listed(place: Path) -> Mapping[str, Any]:
    file = place / ADDED_TOKENS
    return read_json(file) if file.is_file() else {}


def _following(tokenizer: PreTrainedTokenizerBase, known: Mapping[str, int]) -> int | None:
    """Return the id that the next token added to `known` gets; None if it would not be the one after the last."""
    size, last_added = tokenizer.vocab_size, max(tokenizer.added_tokens_decoder, default=-1)
    given = last_added + 1 if last_added >= size else size  # the library counts over holes
    return given if given == max(known.values(), default=-1) + 1 else None


def _on_listed(file: Path, refused: Sequence[tuple[Path, str, object, str]]) -> Iterator[str]:
    """Yield in words what of an added_tokens.json was added, and what was left out and why."""
    of_file = [(token, number, why) for place, token, number, why in refused if place == file.parent]
    for reason in dict.fromkeys(why for *_, why in of_file):
        named = _named([(token, number) for token, number, why in of_file if why == reason], reason)
        yield f"{file} names {named}; left out" if reason else f"{file} adds {named}"


def _take_template(
    tokenizer: PreTrainedTokenizerBase, source: ModelSource, places: Sequence[Path], *, checks: bool
) -> list[str]:
    """Give `tokenizer` the nearest chat template; return a note if base and adapter differ in that.

    `checks`: it has to be written in Jinja2, since no other is asked for.
    """
    found = [(place, read_templates(place)) for place in places]
    chosen = next(((place, templates) for place, templates in found if templates is not None), None)
    if chosen is None:
        return []
    place, templates = chosen
    if checks:
        templates.check()
    if len(places) == 1 and not templates.is_a_processors:
        return []  # transformers has read it
    tokenizer.chat_template = templates.text
    if len(places) == 1:
        return [f"chat template read from {templates.file}"]
    return _on_template(source, place, templates, found[-1][1])


def _on_template(source: ModelSource, place: Path, chosen: Templates, of_base: Templates | None) -> list[str]:
    if place == source.path:
        if not has_vocabulary(places_of(source)[0]):
            return []  # the whole tokenizer is the base's
        return [f"chat template: that of the base ({chosen.file}); the adapter's tokenizer has none"]
    if of_base is None:
        return [f"chat template: the adapter's ({chosen.file}); the base has none"]
    if of_base.text != chosen.text:
        return [f"chat template: the adapter's ({chosen.file}), not that of the base"]
    return []


def _whose(adapter: Path) -> str | None:
    """Return what to call the tokenizer that files of `adapter` make or change; None if they do not."""
    if has_vocabulary(adapter):
        return "the adapter's tokenizer"
    files = [file for file in KEYED if (adapter / file).is_file()]
    return f"the tokenizer, by the adapter's {' and '.join(files)}," if files else None


def _tokenizer_of_base(base: Path, num_rows: int, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | str:
    """Return the tokenizer of a base that an adapter's is put in the place of, or in words why there is none."""
    if not has_vocabulary(base):
        return "the tokenizer is the adapter's; the base has none"
    try:
        of_base = _opened(base, trust_remote_code=trust_remote_code)
        _add_listed(of_base, [base], base=base, num_rows=num_rows)
    except Exception as error:  # noqa: BLE001 - of a damaged file, tokenizers raises a bare one; it is not used
        return f"the tokenizer is the adapter's; that of the base can't be read: {str(error).splitlines()[0]}"
    return of_base


def _differences(
    tokenizer: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase, whose: str, known: Collection[str]
) -> list[str]:
    """Return in words what `tokenizer`, which is called `whose`, has otherwise than the base's.

    These are tokens it has gained, as far as they are `known` to be its own, lost or moved, and the special ones.
    """
    ours: dict[str, int] = tokenizer.get_vocab()
    theirs: dict[str, int] = of_base.get_vocab()
    gained = {token: number for token, number in ours.items() if token not in theirs and token in known}
    lost = {token: number for token, number in theirs.items() if token not in ours}
    moved = {token: number for token, number in ours.items() if theirs.get(token, number) != number}
    special = list(_special_differences(tokenizer, of_base))
    return [
        *([f"{whose} has {_named(_by_id(gained), 'more than the base')}"] if gained else []),
        *([f"{whose} lacks {_named(_by_id(lost), 'of the base')}"] if lost else []),
        *([f"{whose} has {_named(_by_id(moved), 'with another id than in the base')}"] if moved else []),
        *([f"{whose} has other special tokens than the base: {', '.join(special)}"] if special else []),
    ]


def _special_differences(tokenizer: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield in words each role that another token has than in the base, or none.

    A base that pads with none, or with its end, is given another token whenever it is trained.
    """
    ours, theirs = tokenizer.special_tokens_map, of_base.special_tokens_map
    for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token, before = ours.get(role), theirs.get(role)
        if token != before and not (role == "pad_token" and before in {None, of_base.eos_token}):
            yield f"{role} is {_quoted(token)}, not {_quoted(before)}"


def _quoted(token: object) -> str:
    return "none" if token is None else repr(str(token))


def _by_id(tokens: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(tokens.items(), key=lambda one: one[1])


def _named(tokens: Sequence[tuple[str, object]], how: str = "") -> str:
    shown_ones = ", ".join(f"{token!r} (id {shown(number)})" for token, number in tokens[:MOST_NAMED])
    more = f" and {len(tokens) - MOST_NAMED:,} more" if len(tokens) > MOST_NAMED else ""
    counted = f"{len(tokens):,} token{'s' if len(tokens) > 1 else ''} {how}".strip()
    return f"{counted}: {shown_ones}{more}"


def templates_left_out(source: ModelSource, others: Sequence[ModelSource], template: object) -> list[str]:
    """Return in words whose chat templates a model merged from `source` and other adapters goes without."""
    return [
        f"chat template: that of {source.name}; the one of {other.name} ({found.file}) is left out"
        for other in others
        if other.adapter is not None
        and (found := read_templates(other.adapter)) is not None
        and found.text != template
    ]
