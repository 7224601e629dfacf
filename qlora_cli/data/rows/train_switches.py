"""Read the switches by which many tools say whether a message, a part of one, or a row is trained.

A switch is true or false, 0 or 1, or one of them as text, which is all that CSV can write. A key that is named like a
switch and holds such a value, but is not one of those known, is an error: it would be ignored.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import RowError, is_blank

# Weights that other tools give to the loss of a message or row; 0 means that it is not trained.
WEIGHTS = ("weight", "loss_weight", "loss_scale")
# The switches of axolotl, OpenAI, ms-swift, verl and LLaMA-Factory, with the value that means trained.
SWITCHES = {
    **dict.fromkeys(("train", "training", "trainable", *WEIGHTS, "loss", "loss_mask"), True),
    "masked": False,
}
TRAIN = "train"  # the key under which a message that was read holds the value of its switches
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# The name of a switch has one of these words, as `is_trainable`, `ignore_loss` and `lossMask` do; not `constraints`.
SWITCH_WORDS = frozenset(
    (
        *("train", "trained", "training", "trainable", "untrained", "loss", "losses", "mask", "masks", "masked"),
        *("weight", "weights", "weighted", "supervise", "supervised", "learn", "learned", "ignore", "ignored"),
    )
)
BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def pop_switch(fields: dict[str, Any], where: str) -> bool | None:
    """Remove the switches from the fields of a message or part, and return whether it is trained; None if unsaid.

    Raises:
        RowError: a switch has an unusable value or is not one of those known, or two of them disagree.
    """
    if SWITCHES.keys().isdisjoint(fields) and not any(map(_is_named_like_switch, fields)):
        return None
    switches = {key: fields.pop(key) for key in SWITCHES if key in fields}
    trained = {
        key: _to_bool(value, f"{where}.{key}") is SWITCHES[key]
        for key, value in switches.items()
        if not is_blank(value)
    }
    for key, value in fields.items():
        if _is_named_like_switch(key) and _may_be_switch(value):
            raise RowError(
                f"{where}.{key} looks like a training switch, but is not a known one",
                hint=f'Use "train": true or false for the whole message, or remove {key!r}.',
            )
    if len(set(trained.values())) > 1:
        raise RowError(f"{where}: {', '.join(trained)} disagree on whether it is trained", hint="Keep one of them.")
    return next(iter(trained.values()), None)


def row_switch(row: Mapping[str, Any]) -> str | None:
    """Return the column that says whether a row, or which of its messages, is trained; a weight only if it is 0."""
    return next((name for name in SWITCHES if _switches_row(name, row.get(name))), None)


def _switches_row(name: str, value: object) -> bool:
    if isinstance(value, list):
        return bool(value)
    if isinstance(value, str) and value.strip().startswith("["):
        return value.strip("[ ]\n") != ""
    switch = _to_bool_or_none(value)
    return switch is not None and (name not in WEIGHTS or isinstance(value, bool) or not switch)


def _to_bool(value: object, where: str) -> bool:
    switch = _to_bool_or_none(value)
    if switch is not None:
        return switch
    if isinstance(value, int | float):
        raise RowError(
            f"{where} is {value}: a message is either trained or not, other weights are not supported",
            hint="Write 0 or 1 instead.",
        )
    raise RowError(f"{where} must be true or false, found {value!r}")


def _to_bool_or_none(value: object) -> bool | None:
    if isinstance(value, str):
        return BOOLEANS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


@functools.lru_cache(maxsize=4096)
def _is_named_like_switch(key: str) -> bool:
    return not SWITCH_WORDS.isdisjoint(word.lower() for word in WORD.findall(key))


def _may_be_switch(value: object) -> bool:
    """Return whether `value`, or any value within it, may be that of a switch: a boolean or a weight."""
    if isinstance(value, Mapping):
        return any(map(_may_be_switch, value.values()))
    if isinstance(value, list):
        return any(map(_may_be_switch, value))
    return _to_bool_or_none(value) is not None or (isinstance(value, float) and 0 < value < 1)
