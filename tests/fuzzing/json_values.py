"""JSON values, some of them replaced by others."""

import json
from copy import deepcopy
from typing import Any

from tests.fuzzing.frame import Generator, damage

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**6,
        2**31,
        2**63,
        10**30,
        10**400,
        10**4000,
        -(10**18),
        0.5,
        -0.0,
        1e308,
        float("nan"),
    ),
    *(float("inf"), "", "x", "1", "../x", "/", "~", "\0", "\ud800", "\u202e", "a.b", "(", ".*", "(a|a)*b", "é" * 300),
    *([], {}, [None], [[]], [1, "x"], {"": 1}, {"x": None}, [0, 10**9], ["q_proj"] * 50, {"q_proj": 10**9}),
    *({"event": "step_done"}, [{"a": [1]}], "2024-13-45", "9999-12-31T23:59:59+14:00", "0001-01-01T00:00:00+14:00"),
)
MOST_CHANGES = 3


def changed(value: Any, chance: Generator) -> Any:
    """Return a copy of `value` with up to `MOST_CHANGES` values in it changed, removed, or copied elsewhere."""
    copy = deepcopy(value)
    for _ in range(chance.integers(1, MOST_CHANGES + 1)):
        entries = _entries(copy)
        holder, key = entries[chance.integers(len(entries))]
        draw = chance.random()
        if draw < 0.15:
            del holder[key]
        elif draw < 0.3:
            other_holder, other_key = entries[chance.integers(len(entries))]
            holder[key] = deepcopy(other_holder[other_key])
        elif draw < 0.4 and isinstance(holder, dict):
            holder[str(ODD[chance.integers(len(ODD))])] = holder[key]
        else:
            holder[key] = deepcopy(ODD[chance.integers(len(ODD))])
        if not copy:
            return copy
    return copy


def as_bytes(value: Any, chance: Generator) -> bytes:
    """Return `value`, changed, as the content of a file, which is sometimes damaged as well."""
    content = json.dumps(changed(value, chance)).encode()
    return damage(content, chance) if chance.random() < 0.15 else content


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """Return every container in `value` with each of its keys or indices; `value` is not empty."""
    entries: list[tuple[Any, Any]] = []
    holders = [value]
    for holder in holders:  # which grows
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        entries += [(holder, key) for key in keys]
        holders += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return entries
