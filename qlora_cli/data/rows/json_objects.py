"""Make objects of JSON, in which a key that is there twice would silently be what it is the last time."""

from typing import Any


def object_of(pairs: list[tuple[str, Any]], *, repeated: list[str]) -> dict[str, Any]:
    """Return an object, and add the keys to `repeated` that stand for two values which differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        first: dict[str, Any] = {}
        repeated += [key for key, value in pairs if first.setdefault(key, value) != value]
    return found


def name_repeated_key(key: str) -> str:
    """Return what is wrong with an object that has a key twice."""
    return f"the key {key!r} is there twice, with values that differ"
