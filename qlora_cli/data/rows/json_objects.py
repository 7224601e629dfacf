"""Make objects of JSON, in which a key that is there twice would silently be what it is the last time."""

from typing import Any, NamedTuple


class RepeatedKey(NamedTuple):
    """An object, and a key of it that stands for two values which differ."""

    object: dict[str, Any]
    key: str


def build_object(pairs: list[tuple[str, Any]], *, repeated: list[RepeatedKey]) -> dict[str, Any]:
    """Return an object, and add to `repeated` the keys of it that stand for two values which differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        first: dict[str, Any] = {}
        repeated += [RepeatedKey(made, key) for key, value in pairs if first.setdefault(key, value) != value]
    return made


def describe_repeated_key(key: str) -> str:
    """Return what is wrong with an object that has a key twice."""
    return f"the key {key!r} is there twice, with values that differ"
