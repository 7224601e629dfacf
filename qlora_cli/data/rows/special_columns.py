"""Detect columns that change what a row means: preferences, verdicts on an answer, pictures, files.

Candidates are recognised by their names, then judged by their values.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import is_blank
from qlora_cli.data.rows.messages import is_media_name
from qlora_cli.data.rows.train_switches import SWITCHES

# Words for the better and the worse answer, alone or with a word for an answer: `rejected`, `rejected_answer`.
BETTER, WORSE = frozenset({"chosen", "preferred"}), frozenset({"rejected", "dispreferred", "nonpreferred"})
ANSWERS = frozenset(
    (
        *("answer", "answers", "response", "responses", "completion", "completions", "output", "outputs", "reply"),
        *("message", "messages", "conversation", "conversations", "turn", "turns", "text", "solution", "content"),
    )
)
BETTER_OF_TWO, WORSE_OF_TWO = "response_j", "response_k"
WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
# Names of columns that belong to a conversation.
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
HISTORY, THINKING = "history", "enable_thinking"
TEMPLATE_VARIABLES = ("chat_template_kwargs", "apply_chat_template_kwargs")
# Columns of several answers, and of how good each is.
RANKED = ("responses", "completions", "candidates", "generations")
RANKS = ("scores", "ratings", "ranks", "rankings", "labels")
# Columns that say whether the answer is wanted. A bare label does so only as a boolean; else it may mean anything.
LABEL, VERDICTS = "label", ("kto_tag", "kto_label", "desirable")
LABELS = (LABEL, *VERDICTS)
# Words that do so only as booleans (a number of them is a count): true approves, or disapproves, of the answer.
APPROVING = frozenset({"chosen", "preferred", "accepted", "desirable", "approved", "thumbsup"})
DISAPPROVING = frozenset({"rejected", "dispreferred", "nonpreferred", "undesirable", "thumbsdown"})
# Columns that hold pictures and sounds; others, such as `image_url`, are often metadata of the text.
MEDIA_COLUMN = re.compile(r"(image|video|audio)s?(_?\d+)?|pixel_values", re.IGNORECASE)
# Columns of files. A name or path often says where the text is from; a pointer to a file's content is part of the row.
FILE_COLUMN = re.compile("files?|attachments?", re.IGNORECASE)
POINTERS = frozenset({"file_id", "file_data", "file_url", "bytes"})
FILE_NAME = re.compile(
    r".+\.(pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|flac|ogg|m4a|mp4|mov|webm)", re.IGNORECASE
)
# Placeholders of pictures and sounds: in rows that have such a column, and those that are unmistakable in any row.
PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:_pad|_?\d+)?\|?>|<\|vision_start\|>|<img>[^<>\n]+</img>")
UNMISTAKABLE = re.compile(r"<\|(?:image|video|audio)_pad\|>|<\|vision_start\|>|<img>[^<>\n]+</img>")
_NAMES = frozenset(
    {*RANKED, *RANKS, LABEL, *VERDICTS, *SWITCHES, *SYSTEM, *TOOLS, HISTORY, *TEMPLATE_VARIABLES, THINKING}
)


@functools.lru_cache(maxsize=4096)
def may_change_meaning(column: str) -> bool:
    """Return whether a column of this name may change what a row means, if it is ignored."""
    return (
        column in _NAMES
        or FILE_COLUMN.fullmatch(column) is not None
        or is_media_name(column)
        or _is_better_side(column) is not None
        or _approval(column) is not None
    )


def find_media_column(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that holds a picture, a sound or a file."""
    for name, value in row.items():
        if MEDIA_COLUMN.fullmatch(name) and not is_blank(value) and not isinstance(value, int | float):
            return name
        if FILE_COLUMN.fullmatch(name) and _holds_files(value):
            return name
    return None


def _holds_files(value: object) -> bool:
    """Return whether a value points to the content of files, or lists files that hold more than text."""
    if isinstance(value, Mapping):
        return any(not is_blank(value[key]) for key in POINTERS & value.keys())
    return isinstance(value, list) and any(
        _holds_files(part) or (isinstance(part, str) and FILE_NAME.fullmatch(part) is not None) for part in value
    )


@functools.lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case: `rejectedAnswer` has two, `non_preferred` counts as one."""
    joined = "_".join(word.lower() for word in WORD.findall(name))
    for pair in ("non_preferred", "thumbs_up", "thumbs_down"):
        joined = joined.replace(pair, pair.replace("_", ""))
    return tuple(joined.split("_"))


def _is_better_side(name: str) -> bool | None:
    """Return True if a column is named like the better answer, False if like the worse one, None if like neither."""
    if name in (BETTER_OF_TWO, WORSE_OF_TWO):
        return name == BETTER_OF_TWO
    words = set(words_of(name)) - ANSWERS
    if len(words) != 1:
        return None
    (word,) = words
    return word in BETTER if word in BETTER | WORSE else None


def comparison_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that compare answers: preference pairs, and answers with their ranks."""
    sides = [
        name
        for name, value in row.items()
        if _is_better_side(name) is not None and isinstance(value, str | list | dict) and not is_blank(value)
    ]
    ranked = [name for name in RANKED if isinstance(row.get(name), list)]
    ranks = [name for name in RANKS if isinstance(row.get(name), list)]
    better_first = sorted(sides, key=lambda name: not _is_better_side(name))
    return better_first + (ranked + ranks if ranked and ranks else [])


def better_answer_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that are named like the better answer, the shortest name first."""
    return sorted((name for name in row if _is_better_side(name) and not is_blank(row[name])), key=len)


def find_verdict(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the column that says whether the answer of a row is wanted, and the value that means it is not."""
    for name, value in row.items():
        normalized = value.strip().lower() if isinstance(value, str) else value
        is_boolean = isinstance(value, bool) or normalized in ("true", "false")
        if (is_boolean and name == LABEL) or (name in VERDICTS and (is_boolean or normalized in (0, 1, "0", "1"))):
            return name, "false"
        if is_boolean and (approval := _approval(name)) is not None:
            return name, "false" if approval else "true"
    return None


@functools.lru_cache(maxsize=4096)
def _approval(name: str) -> bool | None:
    """Return whether true in a column of this name means that an answer is wanted; None if it means neither."""
    words = set(words_of(name)) - ANSWERS - {"is", "was"}
    if len(words) != 1 or not words <= APPROVING | DISAPPROVING:
        return None
    return words <= APPROVING


def placeholder_in(values: list[Any], *, has_media: bool) -> str | None:
    """Return a placeholder of a picture or sound in the texts of `values`; None if there is none.

    `has_media`: the row has a column of media, so that ambiguous placeholders count too. As every row is searched,
    a search for one character rules out nearly all texts.
    """
    pattern = PLACEHOLDER if has_media else UNMISTAKABLE
    containers: list[dict[str, Any] | list[Any]] = [values]
    for container in containers:  # grows while it is iterated over
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, str):
                if ">" in value and (match := pattern.search(value)):
                    return match[0]
            elif isinstance(value, dict | list):
                containers.append(value)
    return None
