"""What a chat template writes around the turns of a conversation, found by rendering marked ones.

A Jinja template is a program. Most of them write the same text before and after every turn of a role; where that is
so, the texts are cut out here, and proven by rendering other conversations both ways. Where it is not, that is an
error: half a template would serve another prompt than was trained.
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
MARKS = {SYSTEM: "sYsTeMmArK", USER: "uSeRmArK", ASSISTANT: "aNsWeRmArK"}
# Contents that a template might treat otherwise than a mark, if it looked at them.
CONTENTS = (
    "a",
    "two\nlines\n\nand more",
    'quotes " \' """ and \\n',
    "{{ braces }} {% if %} {#",
    "Größe 日本語 🙂 <b>&amp;",
)
HINT = (
    "Serve it with llama.cpp, which takes the chat template as it is (--format gguf; llama-server --jinja), or write "
    "a Modelfile with a TEMPLATE by hand."
)


class SystemPlace(Enum):
    """Where the system message goes: a turn of its own, before the first or the last user's text, or nowhere."""

    OWN_TURN = "own turn"
    FIRST_USER = "first user"
    LAST_USER = "last user"
    NOWHERE = "nowhere"


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The texts around contents.

    Attributes:
        opening: The BOS token, if every conversation begins with it.
        default: What comes next if no system message is first.
        before: What stands before the content of a role.
        after: What stands after it; of a user, up to the answer. An answer that is to be gone on with has none.
        generation: What more the last turn of the user ends with, for the model to answer.
        place: Where the system message goes.
    """

    opening: str
    default: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    generation: str
    place: SystemPlace

    def render(self, messages: Messages) -> str:
        """Return the prompt for `messages`, which begin with the system message if there is one."""
        has_system = messages[0][0] == SYSTEM
        text = self.opening + ("" if has_system else self.default)
        for index, (role, content) in enumerate(messages):
            is_last = index == len(messages) - 1
            if role == SYSTEM and self.place in {SystemPlace.NOWHERE, SystemPlace.LAST_USER}:
                continue
            if not (role == USER and index == 1 and has_system and self.place == SystemPlace.FIRST_USER):
                text += self.before[role]
            if role == USER and is_last and has_system and self.place == SystemPlace.LAST_USER:
                text += self.before[SYSTEM] + messages[0][1] + self.after[SYSTEM]
            text += content
            if not (role == ASSISTANT and is_last):
                text += self.after[role]
            if role == USER and is_last:
                text += self.generation
        return text


def derive_turns(tokenizer: PreTrainedTokenizerBase, *, drops_bos: bool) -> Turns:
    """Return what the chat template of `tokenizer` writes around turns.

    `drops_bos`: the opening is to be left out, because what serves the model writes BOS itself.

    Raises:
        ModelError: it writes something else than the same text around every turn.
    """
    prober = _Prober(tokenizer)
    turns = _derive(prober, tokenizer.bos_token or "", drops_bos=drops_bos)
    for messages in _conversations(turns.place):
        if turns.render(messages) != prober.text(messages):
            roles = ", ".join(role for role, _ in messages)
            raise _inexpressible(f"it does not write the same text around every turn of a role ({roles})")
    return turns


def trims(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> bool:
    """Whether the template takes away white space around contents, which no text around them can."""
    padded = [(role, f" \n{MARKS[role]}\n ") for role in (USER, ASSISTANT, USER)]
    return turns.render(padded) != _Prober(tokenizer).text(padded)


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with BOS by itself, as what is made of it will."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


class _Prober:
    """Renders conversations with the template of `tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(self, messages: Messages, *, answering: bool = True) -> str:
        """Return what the template makes of `messages`, up to where the model answers unless told otherwise."""
        asked = [{"role": role, "content": content} for role, content in messages]
        return render(self._tokenizer, asked, add_generation_prompt=answering)

    def pieces(self, *roles: str, answering: bool = True) -> tuple[tuple[str, ...], list[str]]:
        """Return what stands around the contents of a conversation, and the roles in the order of the text."""
        marks = [(role, f"{MARKS[role]}{index}") for index, role in enumerate(roles)]
        text = self.text(marks, answering=answering)
        for role, mark in marks:
            if (count := text.count(mark)) != 1:
                raise TemplateRefusalError(f"it writes the content of a message of the {role} {count} times")
        placed = sorted(marks, key=lambda marked: text.index(marked[1]))
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
    # Where a token that is in front of each turn is the BOS token too, it is no opening unless it has to go.
    opening = bos if first.startswith(bos) and (drops_bos or bos not in again) else ""
    first = first.removeprefix(opening)
    place, before_system, after_system = _system(prober, opening, first, again)
    after_system_turn = [after_system] if place == SystemPlace.OWN_TURN else []
    before_user = _before_user(first, [again, *after_system_turn], tail)
    after_user = _shared(between, end)
    if place == SystemPlace.OWN_TURN:
        after_system = after_system.removesuffix(before_user)
    return Turns(
        opening=opening,
        default=first.removesuffix(before_user),
        before={SYSTEM: before_system, USER: before_user, ASSISTANT: between.removeprefix(after_user)},
        after={SYSTEM: after_system, USER: after_user, ASSISTANT: again.removesuffix(before_user)},
        generation=end.removeprefix(after_user),
        place=place,
    )


def _system(prober: _Prober, opening: str, first: str, again: str) -> tuple[SystemPlace, str, str]:
    """Return where a system message goes, what stands before it, and what stands between it and the user's text."""
    try:
        roles, pieces = prober.pieces(SYSTEM, USER, ASSISTANT, USER)
    except TemplateRefusalError:  # by an error of its own, or by leaving it out
        return SystemPlace.NOWHERE, "", ""
    if roles[0] == SYSTEM:
        behind = pieces[1]
        # What ends with the beginning of the user's turn has ended its own.
        joins = again.endswith(first) and not behind.endswith(first)
        place = SystemPlace.FIRST_USER if joins else SystemPlace.OWN_TURN
        return place, pieces[0].removeprefix(opening), behind
    where = roles.index(SYSTEM)
    return SystemPlace.LAST_USER, pieces[where].removeprefix(again), pieces[where + 1]


def _before_user(first: str, others: Sequence[str], tail: str) -> str:
    """Return what begins each turn of the user: the end of what stands before the first, and of `others`.

    `tail` ends a conversation behind an answer, and so ends the turn before.
    """
    backwards = [text[::-1] for text in (first, *others)]
    after_answer = others[0].removeprefix(_shared(others[0], tail))
    candidates = [first, after_answer, _shared(*backwards)[::-1]]
    return next(begin for begin in candidates if all(text.endswith(begin) for text in (first, *others)))


def _shared(*texts: str) -> str:
    """Return what all of `texts` begin with."""
    return "".join(same[0] for same in takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False)))


def _conversations(place: SystemPlace) -> list[Messages]:
    """Return conversations of one to three turns, with and without a system message where there is one."""
    found: list[Messages] = []
    for num_turns in (1, 2, 3):
        roles = [USER, *(ASSISTANT, USER) * (num_turns - 1)]
        for shift in range(len(CONTENTS)):
            contents = (*CONTENTS[shift:], *CONTENTS[:shift], *CONTENTS)
            found.append(list(zip(roles, contents, strict=False)))
            if place != SystemPlace.NOWHERE:
                found.append(list(zip([SYSTEM, *roles], contents, strict=False)))
    return found


def _inexpressible(why: str) -> ModelError:
    return ModelError(f"the chat template can't be written as Ollama's TEMPLATE: {why}", hint=HINT)
