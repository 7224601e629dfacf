"""Limits of YAML in settings: no aliases, no deep nesting, no huge numbers.

A few lines of aliases to lists of aliases expand to billions of values; nested values are read recursively; and Python
refuses to convert a number of thousands of digits to text. The events of the parser show all three before any value is
constructed.
"""

import re
from dataclasses import dataclass

import yaml

MAX_BYTES = 256 * 1024  # ten times a file with every setting, and read in seconds
MAX_NESTING = 20  # levels of lists and mappings; settings have four
LONGEST_NUMBER = 256  # characters; in base 16 or 60, too, a longer number exceeds a float
NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FxX_:.+-]*")  # matches some texts, too
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# ValueError: an invalid date. The rest: an explicit tag on a value that does not fit it, such as `!!int ""`.
UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Why a text is not read as settings. Lines count from 1."""

    line: int
    message: str
    hint: str


def find_violation(text: str) -> Violation | None:
    """Return the first violation of the limits in `text`; None if there is none, or `text` is not YAML."""
    try:
        return _find_violation(text)
    except (yaml.YAMLError, ValueError):  # reported when its values are constructed
        return None


def _find_violation(text: str) -> Violation | None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            message = f"{sign}{event.anchor} is an anchor or alias, which settings do not support"
            return Violation(line=line, message=message, hint="Write the value itself, or put the text in quotes.")
        if isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
            message = f"a number of more than {LONGEST_NUMBER} characters"
            return Violation(line=line, message=message, hint="If it is a text, put it in quotes.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            message = f"nested too deeply (more than {MAX_NESTING} levels of lists and mappings)"
            return Violation(line=line, message=message, hint="No setting is nested that deeply.")
    return None


def _is_long_number(event: yaml.ScalarEvent) -> bool:
    if len(event.value) <= LONGEST_NUMBER:
        return False
    is_plain = event.implicit[0]
    return event.tag in NUMBER_TAGS or (is_plain and NUMBER.fullmatch(event.value) is not None)
