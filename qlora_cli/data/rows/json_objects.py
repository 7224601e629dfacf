"""Build JSON objects and detect repeated keys, of which Python's decoder silently keeps the last value."""

from typing import Any, NamedTuple


class RepeatedKey(NamedTuple):
    """An object, and one of its keys that was written with two different values."""

    object: dict[str, Any]
    key: str


def build_object(pairs: list[tuple[str, Any]], *, repeated: list[RepeatedKey]) -> dict[str, Any]:
    """Return the object made of `pairs`, and append to `repeated` its keys that have two different values."""
    built = dict(pairs)
    if len(built) < len(pairs):
        first_values: dict[str, Any] = {}
        repeated += [RepeatedKey(built, key) for key, value in pairs if first_values.setdefault(key, value) != value]
    return built


def describe_repeated_key(key: str) -> str:
    """Return the message for an object that has a key twice."""
    return f"the key {key!r} is repeated with different values"
