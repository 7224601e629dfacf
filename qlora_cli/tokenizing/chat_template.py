"""Choose the chat template: the tokenizer's own, one of several by name, a file, or a standard one.

The chosen template is saved with the tokenizer, so the model is served with the template that it was trained with.
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

from qlora_cli.bounded import TimeLimitError, UnsafeCodeError
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

DEFAULT = "default"  # the name of the template that is used unless another is chosen
JINJA, NAMED = "chat_template.jinja", "additional_chat_templates"
PROCESSOR_TEMPLATE = "chat_template.json"  # transformers reads it for processors (images), never for a tokenizer
SUFFIXES = (".jinja", ".j2")
MOST_BYTES = 4 * MIB  # a hundred times the longest known template
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
    """The chat templates in a directory: one, or several by name; `files` maps each name to its file."""

    text: str | dict[str, str]
    files: Mapping[str, Path]

    @property
    def file(self) -> Path:
        """The file of the first template."""
        return next(iter(self.files.values()))

    @property
    def belongs_to_processor(self) -> bool:
        """Whether the template is in a file that only processors read."""
        return self.file.name == PROCESSOR_TEMPLATE

    def check(self) -> None:
        """Check that the templates are valid Jinja2, and that rendering them does not crash the process.

        Raises:
            ModelError: one is not, or does; names file and line.
        """
        for name, text in ({DEFAULT: self.text} if isinstance(self.text, str) else self.text).items():
            file = self.files[name]
            _check(text, str(file) if file.suffix in SUFFIXES else f"{file}, chat_template {name!r}")


def read_templates(directory: Path) -> Templates | None:
    """Return the chat templates in `directory`, from .jinja files, else from a config; None if there are none.

    Raises:
        ModelError: a template file can't be read.
    """
    files = {DEFAULT: directory / JINJA, **{path.stem: path for path in sorted((directory / NAMED).glob("*.jinja"))}}
    texts = {name: _text_of(path, hint="Check its permissions.") for name, path in files.items() if path.is_file()}
    if texts := {name: text for name, text in texts.items() if text.strip()}:
        return Templates(
            text=texts[DEFAULT] if texts.keys() == {DEFAULT} else texts, files={name: files[name] for name in texts}
        )
    for file in (directory / "tokenizer_config.json", directory / PROCESSOR_TEMPLATE):
        if file.is_file() and (templates := _parse_templates(file, read_json(file).get("chat_template"))):
            names = [DEFAULT] if isinstance(templates, str) else templates
            return Templates(text=templates, files=dict.fromkeys(names, file))
    return None


def _parse_templates(file: Path, value: Any) -> str | dict[str, str] | None:
    """Parse the chat_template of a config: a string, or a list of templates with their names."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    texts = [*value, *value.values()] if isinstance(value, dict) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ModelError(
            f"{file}: chat_template is neither a string nor a list of named templates",
            hint=how_to_restore(file.parent, file.name),
        )
    templates: str | dict[str, str] | None = value
    return templates


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> list[str]:
    """Set the template of `tokenizer` to `choice`, a file or a name; return notes on it.

    If `choice` is None, the tokenizer keeps its own. Several templates with a default are kept as they are:
    transformers uses `tool_use` for rows with tools, in training and in serving.

    Raises:
        ModelError: no such template, it does not compile, its tokens are missing, or none of several is the default.
    """
    if choice is None:
        return _keep_own(tokenizer)
    existing = existing_path(choice)
    path = existing or Path(choice)
    if (existing is not None and existing.is_file()) or path.suffix in SUFFIXES:
        tokenizer.chat_template = _read_template(path)
        return [f"chat template read from {path}", *_note_split_markers(tokenizer, str(tokenizer.chat_template))]
    own = _templates_by_name(tokenizer)
    if choice in own:
        _check(own[choice], f"the tokenizer's chat template {choice!r}")
        tokenizer.chat_template = own[choice]
        return [f"chat template: the tokenizer's {choice!r}"]
    if choice in STANDARD_TEMPLATES:
        return _use_standard(tokenizer, choice, STANDARD_TEMPLATES[choice])
    raise ModelError(
        f"no chat template {choice!r}: the tokenizer has {_listed(own)}, and there is no such file",
        hint=f"Give a .jinja file, or a name: {', '.join(sorted({*own, *STANDARD_TEMPLATES}))}.",
    )


def _templates_by_name(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer's templates by name; a single one is the default."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own
    return {} if own is None else {DEFAULT: own}


def _keep_own(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    own = tokenizer.chat_template
    if not isinstance(own, dict) or DEFAULT in own:
        return []
    if len(own) > 1:
        raise ModelError(
            f"the tokenizer has several chat templates and none is the default: {_listed(own)}",
            hint="Choose one with --chat-template NAME.",
        )
    [(name, tokenizer.chat_template)] = own.items()
    return [f"chat template: the tokenizer's only one, {name!r}"]


def _listed(names: dict[str, str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _read_template(path: Path) -> str:
    text = _text_of(path, hint="Check --chat-template.")
    if not text.strip():
        raise ModelError(f"{path} is empty: no chat template", hint="Check --chat-template.")
    _check(text, str(path))
    return text


def _check(text: str, where: str) -> None:
    try:
        try_template(text)  # before compiling, which evaluates its constants
        # Compiles it, with the extensions of transformers.
        within_limits(partial(render_jinja_template, [], chat_template=text))
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{where}, line {error.lineno}: {error.message}", hint="Correct the template; it is written in Jinja2."
        ) from error
    except UnsafeCodeError as error:
        raise ModelError(f"{where}: the chat template can't be rendered: {error}", hint=OTHER_TEMPLATE) from error
    except (*ENDLESS, TimeLimitError) as error:
        raise ModelError(
            f"{where}: the chat template nests too deeply to be compiled, or takes too much time or memory",
            hint=OTHER_TEMPLATE,
        ) from error
    except TEMPLATE_ERRORS as error:  # such as an integer of thousands of digits, which can't be converted to text
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
    """Return a note on the markers of a template that are not single tokens; in some, such as Zephyr's, by design."""
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
    # A model trained with BOS before every text keeps it; here the template writes it, not the tokenizer.
    starts = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + standard.text
    notes = [f"chat template: the standard {name!r}"]
    if tokenizer.eos_token != standard.turn_end:
        notes.append(
            f"{name!r} ends turns with {standard.turn_end}, so that is the eos token now, not {tokenizer.eos_token}"
        )
        tokenizer.add_special_tokens({"eos_token": standard.turn_end})
    return notes
