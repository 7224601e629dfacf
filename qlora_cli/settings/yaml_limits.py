"""What YAML may not do in settings: stand for more than is written, or nest without an end.

A few lines of aliases, each of a list of aliases, are billions of values; what reads nested values calls itself for
each level; and a number of thousands of digits has no text that Python would write. All are found by reading the text
piece by piece, before a value is made of it.
"""

import re
from dataclasses import dataclass

import yaml

MOST_BYTES = 256 * 1024  # a file with every setting is a tenth of it; to read one takes seconds
MAX_NESTING = 20  # lists and mappings in each other; settings have four
LONGEST_NUMBER = 256  # characters: what is written so, also in base 16 or 60, is no more than a float can be
NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FxX_:.+-]*")  # also what YAML reads as a text for all that
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# ValueError: what looks like a date and is none. The rest: an explicit tag on what is none, as `!!int ""`.
UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Why a text is not read: the line, from 1, and what is there."""

    line: int
    message: str
    hint: str


def find_violation(text: str) -> Violation | None:
    """Return why `text` is not read as settings; None if it may be, or is no YAML at all."""
    try:
        return _find_violation(text)
    except (yaml.YAMLError, ValueError):  # which is reported when values are made of it
        return None


def _find_violation(text: str) -> Violation | None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            message = f"{sign}{event.anchor} makes one value stand for another, which settings do not take"
            return Violation(line=line, message=message, hint="Write the value itself, or put the text in quotes.")
        if isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
            message = f"a number of more than {LONGEST_NUMBER} characters"
            return Violation(line=line, message=message, hint="If it is a text, put it in quotes.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            message = f"nested too deeply (more than {MAX_NESTING} lists and mappings in each other)"
            return Violation(line=line, message=message, hint="No setting is nested so.")
    return None


def _is_long_number(event: yaml.ScalarEvent) -> bool:
    if len(event.value) <= LONGEST_NUMBER:
        return False
    is_plain = event.implicit[0]
    return event.tag in NUMBER_TAGS or (is_plain and NUMBER.fullmatch(event.value) is not None)
