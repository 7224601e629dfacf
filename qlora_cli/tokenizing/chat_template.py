"""Settle the chat template: the tokenizer's own, one of several that it names, a file, or a standard one.

Whatever is chosen is saved with the tokenizer, so what is served is what was trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.bounded import DeadlyError, TimeOutError
from qlora_cli.errors import ModelError
from qlora_cli.files import existing_path, open_regular
from qlora_cli.model_files.checkpoint import how_to_restore, read_json
from qlora_cli.tokenizing.template_rendering import (
    ENDLESS,
    OTHER_TEMPLATE,
    TEMPLATE_ERRORS,
    try_template,
    within_limits,
)
from qlora_cli.units import MIB, format_bytes

DEFAULT = "default"  # the name of the template that is taken unless another is asked for
JINJA, NAMED = "chat_template.jinja", "additional_chat_templates"
OF_PROCESSOR = "chat_template.json"  # which transformers reads for a model that sees images, never for a tokenizer
SUFFIXES = (".jinja", ".j2")
MOST_BYTES = 4 * MIB  # the longest known have a hundredth of it
MARKER = re.compile(r"<\|[^|<>{}'\"\s]+\|>")


@dataclass(frozen=True, kw_only=True)
class StandardTemplate:
    """A template that many models share, the token that ends its turns, and all tokens it needs."""

    text: str
    turn_end: str
    tokens: tuple[str, ...]


STANDARD_TEMPLATES = {
    "chatml": StandardTemplate(
        text="{% if tools %}{{ raise_exception('chatml has no place for tools') }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        turn_end="<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Templates:
    """What a directory holds of chat templates: one, or several by name; `files` are where each is."""

    text: str | dict[str, str]
    files: Mapping[str, Path]

    @property
    def file(self) -> Path:
        """Where they are, or the first of them."""
        return next(iter(self.files.values()))

    @property
    def is_a_processors(self) -> bool:
        """Whether they lie where only a processor of images looks for them."""
        return self.file.name == OF_PROCESSOR

    def check(self) -> None:
        """Check that they are written in Jinja2, and can be rendered without an end of the process.

        Raises:
            ModelError: one is not, or can't; names file and line.
        """
        for name, text in ({DEFAULT: self.text} if isinstance(self.text, str) else self.text).items():
            file = self.files[name]
            _check(text, str(file) if file.suffix in SUFFIXES else f"{file}, chat_template {name!r}")


def read_templates(directory: Path) -> Templates | None:
    """Return the chat templates in `directory`, the files of their own before what configs hold; None without any.

    Raises:
        ModelError: a file of them can't be read.
    """
    files = {DEFAULT: directory / JINJA, **{path.stem: path for path in sorted((directory / NAMED).glob("*.jinja"))}}
    texts = {name: _text_of(path, hint="Check its permissions.") for name, path in files.items() if path.is_file()}
    if texts := {name: text for name, text in texts.items() if text.strip()}:
        return Templates(
            text=texts[DEFAULT] if texts.keys() == {DEFAULT} else texts, files={name: files[name] for name in texts}
        )
    for file in (directory / "tokenizer_config.json", directory / OF_PROCESSOR):
        if file.is_file() and (found := _templates_in(file, read_json(file).get("chat_template"))):
            return Templates(text=found, files=dict.fromkeys([DEFAULT] if isinstance(found, str) else found, file))
    return None


def _templates_in(file: Path, value: Any) -> str | dict[str, str] | None:
    """Return what a config holds under chat_template: a text, or several, listed with their names."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    texts = [*value, *value.values()] if isinstance(value, dict) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ModelError(
            f"{file}: chat_template is neither a text nor a list of them by name",
            hint=how_to_restore(file.parent, file.name),
        )
    templates: str | dict[str, str] | None = value
    return templates


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> list[str]:
    """Give `tokenizer` the template that is `wanted`, a file or a name; return notes on what was chosen.

    Without a wish the tokenizer keeps what it has. Several templates with a default are kept as they are:
    transformers takes `tool_use` for rows with tools, when training and when serving.

    Raises:
        ModelError: no such template, it does not compile, its tokens are missing, or none of several is the default.
    """
    if wanted is None:
        return _keep(tokenizer)
    found = existing_path(wanted)
    path = found or Path(wanted)
    if (found is not None and found.is_file()) or path.suffix in SUFFIXES:
        tokenizer.chat_template = _read(path)
        return [f"chat template read from {path}", *_note_split_markers(tokenizer, str(tokenizer.chat_template))]
    own = _named(tokenizer)
    if wanted in own:
        _check(own[wanted], f"the tokenizer's chat template {wanted!r}")
        tokenizer.chat_template = own[wanted]
        return [f"chat template: the tokenizer's {wanted!r}"]
    if wanted in STANDARD_TEMPLATES:
        return _use_standard(tokenizer, wanted, STANDARD_TEMPLATES[wanted])
    raise ModelError(
        f"no chat template {wanted!r}: the tokenizer has {_list(own)}, and there is no such file",
        hint=f"Give a .jinja file, or a name: {', '.join(sorted({*own, *STANDARD_TEMPLATES}))}.",
    )


def _named(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer's templates by name; a single one is the default."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own
    return {} if own is None else {DEFAULT: own}


def _keep(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    own = tokenizer.chat_template
    if not isinstance(own, dict) or DEFAULT in own:
        return []
    if len(own) > 1:
        raise ModelError(
            f"the tokenizer has several chat templates and none is the default: {_list(own)}",
            hint="Choose one with --chat-template NAME.",
        )
    [(name, tokenizer.chat_template)] = own.items()
    return [f"chat template: the tokenizer's only one, {name!r}"]


def _list(names: dict[str, str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _read(path: Path) -> str:
    text = _text_of(path, hint="Check --chat-template.")
    if not text.strip():
        raise ModelError(f"{path} is empty: no chat template", hint="Check --chat-template.")
    _check(text, str(path))
    return text


def _check(text: str, where: str) -> None:
    try:
        try_template(text)  # first of all: to compile it computes its constants
        # Compiles it, with the extensions of transformers.
        within_limits(partial(render_jinja_template, [], chat_template=text))
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{where}, line {error.lineno}: {error.message}", hint="Correct the template; it is written in Jinja2."
        ) from error
    except DeadlyError as error:
        raise ModelError(f"{where}: the chat template can't be rendered: {error}", hint=OTHER_TEMPLATE) from error
    except (*ENDLESS, TimeOutError) as error:
        raise ModelError(
            f"{where}: the chat template nests too deeply to be compiled, or takes too much time or memory",
            hint=OTHER_TEMPLATE,
        ) from error
    except TEMPLATE_ERRORS as error:  # such as a number of thousands of digits, which can't be written
        raise ModelError(f"{where}: the chat template can't be compiled: {error}", hint=OTHER_TEMPLATE) from error


def _text_of(path: Path, hint: str) -> str:
    try:
        with open_regular(path) as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ModelError(f"the chat template {path} can't be read: {error.strerror}", hint=hint) from error
    if len(raw) > MOST_BYTES:
        raise ModelError(f"{path} is larger than {format_bytes(MOST_BYTES)}: no chat template", hint=OTHER_TEMPLATE)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ModelError(f"{path}, line {line}: not UTF-8", hint="Save the template as UTF-8.") from error


def _is_one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(tokenizer.encode(text, add_special_tokens=False)) == 1


def _note_split_markers(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Say which markers of a template are no tokens; some templates mean it so, as Zephyr's."""
    split = [marker for marker in dict.fromkeys(MARKER.findall(template)) if not _is_one_token(tokenizer, marker)]
    if not split:
        return []
    return [
        f"the chat template writes {', '.join(split)}, which the tokenizer splits into several tokens; "
        f"--new-tokens '{','.join(split)}' would make each of them one"
    ]


def _use_standard(tokenizer: PreTrainedTokenizerBase, name: str, standard: StandardTemplate) -> list[str]:
    missing = [token for token in standard.tokens if not _is_one_token(tokenizer, token)]
    if missing:
        raise ModelError(
            f"the chat template {name!r} needs the tokens {', '.join(missing)}, which the tokenizer does not have",
            hint=f"Add --new-tokens '{','.join(missing)}', or choose another --chat-template.",
        )
    # A model that has seen BOS before every text keeps seeing it; templates write it, not the tokenizer.
    starts = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + standard.text
    notes = [f"chat template: the standard {name!r}"]
    if tokenizer.eos_token != standard.turn_end:
        notes.append(
            f"{name!r} ends turns with {standard.turn_end}, so that is the eos token now, not {tokenizer.eos_token}"
        )
        tokenizer.add_special_tokens({"eos_token": standard.turn_end})
    return notes
