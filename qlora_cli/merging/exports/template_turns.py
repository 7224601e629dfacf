"""Derive the texts that a chat template writes around turns, by rendering conversations with markers as contents.

A Jinja template is a program. Most write the same text before and after every turn of a role; these texts are
extracted here, and verified by rendering other conversations both ways. Any other template is an error: a partial
conversion would serve prompts that differ from training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.tokenizing.template_rendering import TemplateRefusalError, render

Messages = Sequence[tuple[str, str]]  # role and content of each
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
MARKERS = {SYSTEM: "sYsTeMmArK", USER: "uSeRmArK", ASSISTANT: "aNsWeRmArK"}
# Contents that a template might treat differently from a marker, if it looks at them.
CONTENTS = (
    "a",
    "two\nlines\n\nand more",
    'quotes " \' """ and \\n',
    "{{ braces }} {% if %} {#",
    "Größe 日本語 🙂 <b>&amp;",
)
HINT = (
    "Serve it with llama.cpp, which uses the chat template itself (--format gguf; llama-server --jinja), or write "
    "a Modelfile with a TEMPLATE by hand."
)


class SystemPosition(Enum):
    """The position of the system message: its own turn, before the first or the last user's text, or none."""

    OWN_TURN = "own turn"
    FIRST_USER = "first user"
    LAST_USER = "last user"
    NOWHERE = "nowhere"


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The texts around the contents of messages.

    Attributes:
        opening: The BOS token, if every conversation begins with it.
        default: What comes next if no system message is first.
        before: The text before the content, by role.
        after: The text after the content; for a user, up to the answer. An answer to be continued has none.
        generation: The generation prompt, which follows the last turn of the user.
        system_position: The position of the system message.
    """

    opening: str
    default: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    generation: str
    system_position: SystemPosition

    def render(self, messages: Messages) -> str:
        """Return the prompt for `messages`, which begin with the system message if there is one."""
        has_system = messages[0][0] == SYSTEM
        text = self.opening + ("" if has_system else self.default)
        for index, (role, content) in enumerate(messages):
            is_last = index == len(messages) - 1
            if role == SYSTEM and self.system_position in {SystemPosition.NOWHERE, SystemPosition.LAST_USER}:
                continue
            if not (role == USER and index == 1 and has_system and self.system_position == SystemPosition.FIRST_USER):
                text += self.before[role]
            if role == USER and is_last and has_system and self.system_position == SystemPosition.LAST_USER:
                text += self.before[SYSTEM] + messages[0][1] + self.after[SYSTEM]
            text += content
            if not (role == ASSISTANT and is_last):
                text += self.after[role]
            if role == USER and is_last:
                text += self.generation
        return text


def derive_turns(tokenizer: PreTrainedTokenizerBase, *, drops_bos: bool) -> Turns:
    """Return the texts that the chat template of `tokenizer` writes around turns.

    With `drops_bos` the opening will be dropped, because the server writes BOS itself.

    Raises:
        ModelError: the texts are not the same around every turn.
    """
    prober = _Prober(tokenizer)
    turns = _derive(prober, tokenizer.bos_token or "", drops_bos=drops_bos)
    for messages in _conversations(turns.system_position):
        if turns.render(messages) != prober.text(messages):
            roles = ", ".join(role for role, _ in messages)
            raise _inexpressible(f"it does not write the same text around every turn of a role ({roles})")
    return turns


def strips_contents(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> bool:
    """Return whether the template strips white space around contents, which texts around them can't do."""
    padded = [(role, f" \n{MARKERS[role]}\n ") for role in (USER, ASSISTANT, USER)]
    return turns.render(padded) != _Prober(tokenizer).text(padded)


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts BOS before every text, as converted ones will."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


class _Prober:
    """Renders conversations with the template of `tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(self, messages: Messages, *, answering: bool = True) -> str:
        """Render `messages`, with the generation prompt if `answering`."""
        asked = [{"role": role, "content": content} for role, content in messages]
        return render(self._tokenizer, asked, add_generation_prompt=answering)

    def pieces(self, *roles: str, answering: bool = True) -> tuple[tuple[str, ...], list[str]]:
        """Return the roles in the order of the text, and the texts around their contents."""
        marked = [(role, f"{MARKERS[role]}{index}") for index, role in enumerate(roles)]
        text = self.text(marked, answering=answering)
        for role, mark in marked:
            if (count := text.count(mark)) != 1:
                raise TemplateRefusalError(f"it writes the content of a message of the {role} {count} times")
        placed = sorted(marked, key=lambda marked: text.index(marked[1]))
        pieces = []
        for _, mark in placed:
            piece, _, text = text.partition(mark)
            pieces.append(piece)
        return tuple(role for role, _ in placed), [*pieces, text]


def _derive(prober: _Prober, bos: str, *, drops_bos: bool) -> Turns:
    try:
        _, (first, between, again, end) = prober.pieces(USER, ASSISTANT, USER)
        _, (*_, tail) = prober.pieces(USER, ASSISTANT, answering=False)
    except TemplateRefusalError as error:
        raise _inexpressible(f"of a user and an assistant: {error}") from error
    # A token before every turn that is also BOS is an opening only if it has to be dropped.
    opening = bos if first.startswith(bos) and (drops_bos or bos not in again) else ""
    first = first.removeprefix(opening)
    system_position, before_system, after_system = _system(prober, opening, first, again)
    after_system_turn = [after_system] if system_position == SystemPosition.OWN_TURN else []
    before_user = _before_user(first, [again, *after_system_turn], tail)
    after_user = _common_prefix(between, end)
    if system_position == SystemPosition.OWN_TURN:
        after_system = after_system.removesuffix(before_user)
    return Turns(
        opening=opening,
        default=first.removesuffix(before_user),
        before={SYSTEM: before_system, USER: before_user, ASSISTANT: between.removeprefix(after_user)},
        after={SYSTEM: after_system, USER: after_user, ASSISTANT: again.removesuffix(before_user)},
        generation=end.removeprefix(after_user),
        system_position=system_position,
    )


def _system(prober: _Prober, opening: str, first: str, again: str) -> tuple[SystemPosition, str, str]:
    """Return the position of a system message, the text before it, and that between it and the user's text."""
    try:
        roles, pieces = prober.pieces(SYSTEM, USER, ASSISTANT, USER)
    except TemplateRefusalError:  # it raises an error, or omits the message
        return SystemPosition.NOWHERE, "", ""
    if roles[0] == SYSTEM:
        following = pieces[1]
        # A text that ends with the start of a user's turn has ended the system's own turn.
        joins = again.endswith(first) and not following.endswith(first)
        system_position = SystemPosition.FIRST_USER if joins else SystemPosition.OWN_TURN
        return system_position, pieces[0].removeprefix(opening), following
    index = roles.index(SYSTEM)
    return SystemPosition.LAST_USER, pieces[index].removeprefix(again), pieces[index + 1]


def _before_user(first: str, others: Sequence[str], tail: str) -> str:
    """Return the text that begins each turn of the user: the common end of `first` and `others`.

    `tail` is the text after a final answer, which ends the assistant's turn.
    """
    backwards = [text[::-1] for text in (first, *others)]
    after_answer = others[0].removeprefix(_common_prefix(others[0], tail))
    candidates = [first, after_answer, _common_prefix(*backwards)[::-1]]
    return next(begin for begin in candidates if all(text.endswith(begin) for text in (first, *others)))


def _common_prefix(*texts: str) -> str:
    """Return the longest common prefix of `texts`."""
    return "".join(same[0] for same in takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False)))


def _conversations(system_position: SystemPosition) -> list[Messages]:
    """Return conversations of one to three turns, also with a system message if the template has one."""
    conversations: list[Messages] = []
    for num_turns in (1, 2, 3):
        roles = [USER, *(ASSISTANT, USER) * (num_turns - 1)]
        for shift in range(len(CONTENTS)):
            contents = (*CONTENTS[shift:], *CONTENTS[:shift], *CONTENTS)
            conversations.append(list(zip(roles, contents, strict=False)))
            if system_position != SystemPosition.NOWHERE:
                conversations.append(list(zip([SYSTEM, *roles], contents, strict=False)))
    return conversations


def _inexpressible(why: str) -> ModelError:
    return ModelError(f"the chat template can't be written as Ollama's TEMPLATE: {why}", hint=HINT)
