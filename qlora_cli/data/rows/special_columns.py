"""Judge columns next to the text: preferences, verdicts on an answer, pictures, files.

Such columns are known by their names, and judged by what is in them.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import is_blank
from qlora_cli.data.rows.messages import is_media
from qlora_cli.data.rows.train_switches import SWITCHES

# Words of the better answer and of the worse one, alone or with what an answer is called: `rejected_answer`.
BETTER, WORSE = frozenset({"chosen", "preferred"}), frozenset({"rejected", "dispreferred", "nonpreferred"})
ANSWERS = frozenset(
    (
        *("answer", "answers", "response", "responses", "completion", "completions", "output", "outputs", "reply"),
        *("message", "messages", "conversation", "conversations", "turn", "turns", "text", "solution", "content"),
    )
)
BETTER_OF_TWO, WORSE_OF_TWO = "response_j", "response_k"
WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
# What belongs to a conversation, by each of its names.
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
HISTORY, THINKING = "history", "enable_thinking"
TEMPLATE_VARIABLES = ("chat_template_kwargs", "apply_chat_template_kwargs")
# Several answers, and how good each is.
RANKED = ("responses", "completions", "candidates", "generations")
RANKS = ("scores", "ratings", "ranks", "rankings", "labels")
# Whether the answer is wanted: a bare label says it by true and false, and may be anything else.
LABEL, VERDICTS = "label", ("kto_tag", "kto_label", "desirable")
# Words that say it by true and false alone, for a number of them counts; those of the contrary say it by false.
APPROVING = frozenset({"chosen", "preferred", "accepted", "desirable", "approved", "thumbsup"})
DISAPPROVING = frozenset({"rejected", "dispreferred", "nonpreferred", "undesirable", "thumbsdown"})
# Columns that hold pictures and sounds; those of other names, such as `image_url`, are often about a text, not in it.
MEDIA_COLUMN = re.compile(r"(image|video|audio)s?(_?\d+)?|pixel_values", re.IGNORECASE)
# Columns of files: a name or path is often where the text is from; what points to a file itself is a part of the row.
FILE_COLUMN = re.compile("files?|attachments?", re.IGNORECASE)
POINTERS = frozenset({"file_id", "file_data", "file_url", "bytes"})
FILE_NAME = re.compile(
    r".+\.(pdf|docx?|xlsx?|pptx?|png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|flac|ogg|m4a|mp4|mov|webm)", re.IGNORECASE
)
# What stands for a picture or sound next to a column of them, and what stands for nothing else anywhere.
PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:_pad|_?\d+)?\|?>|<\|vision_start\|>|<img>[^<>\n]+</img>")
UNMISTAKABLE = re.compile(r"<\|(?:image|video|audio)_pad\|>|<\|vision_start\|>|<img>[^<>\n]+</img>")
_NAMES = frozenset(
    {*RANKED, *RANKS, LABEL, *VERDICTS, *SWITCHES, *SYSTEM, *TOOLS, HISTORY, *TEMPLATE_VARIABLES, THINKING}
)


@functools.lru_cache(maxsize=4096)
def may_change_meaning(column: str) -> bool:
    """Whether a column of this name may say more of a row than its text does."""
    return (
        column in _NAMES
        or FILE_COLUMN.fullmatch(column) is not None
        or is_media(column)
        or _side(column) is not None
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
    """Whether a value points to files, or is a list of such as hold more than text."""
    if isinstance(value, Mapping):
        return any(not is_blank(value[key]) for key in POINTERS & value.keys())
    return isinstance(value, list) and any(
        _holds_files(part) or (isinstance(part, str) and FILE_NAME.fullmatch(part) is not None) for part in value
    )


@functools.lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, ...]:
    """Return the words of a name in small letters, `non_preferred` as one: `rejectedAnswer` has two."""
    joined = "_".join(word.lower() for word in WORD.findall(name))
    for pair in ("non_preferred", "thumbs_up", "thumbs_down"):
        joined = joined.replace(pair, pair.replace("_", ""))
    return tuple(joined.split("_"))


def _side(name: str) -> bool | None:
    """Return whether a column is called as the better answer (True) or the worse one; None if as neither."""
    if name in (BETTER_OF_TWO, WORSE_OF_TWO):
        return name == BETTER_OF_TWO
    words = set(words_of(name)) - ANSWERS
    if len(words) != 1:
        return None
    (word,) = words
    return word in BETTER if word in BETTER | WORSE else None


def comparison_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that hold answers to be compared; none if its answers are all to be given."""
    sides = [name for name, value in row.items() if _side(name) is not None and isinstance(value, str | list | dict)]
    found = [name for name in sorted(sides, key=lambda name: not _side(name)) if not is_blank(row[name])]
    ranked = [name for name in RANKED if isinstance(row.get(name), list)]
    ranks = [name for name in RANKS if isinstance(row.get(name), list)]
    return found + (ranked + ranks if ranked and ranks else [])


def better_answer_columns(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that are called as the better answer, the shortest name first."""
    return sorted((name for name in row if _side(name) and not is_blank(row[name])), key=len)


def find_verdict(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the column that says whether the answer of a row is wanted, and the value by which it is not."""
    for name, value in row.items():
        word = value.strip().lower() if isinstance(value, str) else value
        is_truth = isinstance(value, bool) or word in ("true", "false")
        if (is_truth and name == LABEL) or (name in VERDICTS and (is_truth or word in (0, 1, "0", "1"))):
            return name, "false"
        if is_truth and (approval := _approval(name)) is not None:
            return name, "false" if approval else "true"
    return None


@functools.lru_cache(maxsize=4096)
def _approval(name: str) -> bool | None:
    """Return whether true in a column of this name says that an answer is wanted; None if it says neither."""
    words = set(words_of(name)) - ANSWERS - {"is", "was"}
    if len(words) != 1 or not words <= APPROVING | DISAPPROVING:
        return None
    return words <= APPROVING


def placeholder_in(values: list[Any], *, has_media: bool) -> str | None:
    """Return what stands for a picture or sound in the texts of values; `has_media`: a column may hold it.

    Every row is searched, so that nearly all of its texts have to pass by the search for one character.
    """
    pattern = PLACEHOLDER if has_media else UNMISTAKABLE
    containers: list[dict[str, Any] | list[Any]] = [values]
    for container in containers:  # which grows
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, str):
                if ">" in value and (match := pattern.search(value)):
                    return match[0]
            elif isinstance(value, dict | list):
                containers.append(value)
    return None
