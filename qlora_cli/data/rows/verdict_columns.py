"""What columns beside the text say of a row: that of its answers one is to be avoided, or that it holds pictures.

Such columns are known by their names, and judged by what is in them.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.data.rows.examples import is_nothing
from qlora_cli.data.rows.messages import is_media
from qlora_cli.data.rows.training_switches import SWITCHES

# The better answer and the worse one, as TRL, LLaMA-Factory, ms-swift and data sets of comparisons call them.
BETTER = (
    "chosen",
    "chosen_messages",
    "chosen_response",
    "chosen_conversation",
    "chosen_conversations",
    "preferred",
    "preferred_output",
    "response_j",
)
WORSE = (
    "rejected",
    "rejected_messages",
    "rejected_response",
    "rejected_responses",
    "rejected_conversation",
    "rejected_conversations",
    "dispreferred",
    "non_preferred",
    "non_preferred_output",
    "response_k",
)
# What belongs to a conversation, by each of its names.
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
# Several answers, and how good each is.
RANKED = ("responses", "completions", "candidates", "generations")
RANKS = ("scores", "ratings", "ranks", "rankings", "labels")
# Whether the answer is wanted: a bare label says it by true and false, and may be anything else.
LABEL, VERDICTS = "label", ("kto_tag", "kto_label", "desirable")
# Columns that hold pictures and sounds; those of other names, such as `image_url`, are often about a text, not in it.
HELD = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
PLACEHOLDER = re.compile("<(image|video|audio)>")
_NAMES = frozenset({*BETTER, *WORSE, *RANKED, *RANKS, LABEL, *VERDICTS, *SWITCHES, *SYSTEM, *TOOLS})


@functools.lru_cache(maxsize=4096)
def says_more(column: str) -> bool:
    """Whether a column of this name may say more of a row than its text does."""
    return column in _NAMES or is_media(column)


def held(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that holds a picture or a sound."""
    found = (name for name in HELD if not is_nothing(row.get(name)) and not isinstance(row[name], int | float))
    return next(found, None)


def compared(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row that hold answers to be compared; none if its answers are all to be given."""
    found = [name for name in (*BETTER, *WORSE) if isinstance(row.get(name), str | list | dict)]
    found = [name for name in found if not is_nothing(row[name])]
    ranked = [name for name in RANKED if isinstance(row.get(name), list)]
    ranks = [name for name in RANKS if isinstance(row.get(name), list)]
    return found + (ranked + ranks if ranked and ranks else [])


def verdict(row: Mapping[str, Any]) -> str | None:
    """Return the column that says whether the answer of a row is wanted."""
    for name in (LABEL, *VERDICTS):
        value = row.get(name)
        word = value.strip().lower() if isinstance(value, str) else value
        if isinstance(value, bool) or word in ("true", "false") or (name != LABEL and word in (0, 1, "0", "1")):
            return name
    return None


def placeholder_in(value: object) -> str | None:
    """Return what stands for a picture or sound in the texts of a value."""
    return next((found[0] for text in _texts(value) if (found := PLACEHOLDER.search(text))), None)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
