"""Read the switches that say whether a message, a part of one, or a row is trained, as many tools call them.

A switch is a truth value, 0 or 1, or either as text, which is all that CSV can write. What is called like a switch
and holds one, but is none that is known, is an error: what it says would be ignored.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import RowError, is_blank

# Weights that other tools give to the loss of a message or row; 0 is that it isn't trained.
WEIGHTS = ("weight", "loss_weight", "loss_scale")
# What switches are called by axolotl, OpenAI, ms-swift, verl and LLaMA-Factory; `masked` is the contrary.
SWITCHES = {
    **dict.fromkeys(("train", "training", "trainable", *WEIGHTS, "loss", "loss_mask"), True),
    "masked": False,
}
TRAIN = "train"  # under which a message keeps what its switches say
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# Words of which one is in the name of a switch: `is_trainable`, `ignore_loss`, `lossMask`; not in `constraints`.
SWITCHING = frozenset(
    (
        *("train", "trained", "training", "trainable", "untrained", "loss", "losses", "mask", "masks", "masked"),
        *("weight", "weights", "weighted", "supervise", "supervised", "learn", "learned", "ignore", "ignored"),
    )
)
TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def pop_switch(found: dict[str, Any], where: str) -> bool | None:
    """Take out of a message or part what says whether it is trained; None if nothing does.

    Raises:
        RowError: a switch can't be followed, is none that is known, or two of them differ.
    """
    if SWITCHES.keys().isdisjoint(found) and not any(map(_is_like_a_switch, found)):
        return None
    given = {key: found.pop(key) for key in SWITCHES if key in found}
    said = {
        key: _truth(value, f"{where}.{key}") is SWITCHES[key] for key, value in given.items() if not is_blank(value)
    }
    for key, value in found.items():
        if _is_like_a_switch(key) and _may_switch(value):
            raise RowError(
                f"{where}.{key} looks like a switch of training, and is none that is known",
                hint=f'Say it of the whole message with "train": true or false, or take {key!r} out.',
            )
    if len(set(said.values())) > 1:
        raise RowError(f"{where}: {', '.join(said)} do not agree on whether it is trained", hint="Keep one of them.")
    return next(iter(said.values()), None)


def row_switch(row: Mapping[str, Any]) -> str | None:
    """Return the column that says whether a row is trained, or which of its messages; a weight but 0 is none."""
    return next((name for name in SWITCHES if _switches_row(name, row.get(name))), None)


def _switches_row(name: str, value: object) -> bool:
    if isinstance(value, list):
        return bool(value)
    if isinstance(value, str) and value.strip().startswith("["):
        return value.strip("[ ]\n") != ""
    truth = _truth_or_none(value)
    return truth is not None and (name not in WEIGHTS or isinstance(value, bool) or not truth)


def _truth(value: object, where: str) -> bool:
    truth = _truth_or_none(value)
    if truth is not None:
        return truth
    if isinstance(value, int | float):
        raise RowError(
            f"{where} is {value}: a message is trained or not, and can't count in part", hint="Write 0 or 1 instead."
        )
    raise RowError(f"{where} must be true or false, found {value!r}")


def _truth_or_none(value: object) -> bool | None:
    if isinstance(value, str):
        return TRUTHS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


@functools.lru_cache(maxsize=4096)
def _is_like_a_switch(key: str) -> bool:
    return not SWITCHING.isdisjoint(word.lower() for word in WORD.findall(key))


def _may_switch(value: object) -> bool:
    """Whether a value may say that something is trained, or to which part: a truth value, or one inside of it."""
    if isinstance(value, Mapping):
        return any(map(_may_switch, value.values()))
    if isinstance(value, list):
        return any(map(_may_switch, value))
    return _truth_or_none(value) is not None or (isinstance(value, float) and 0 < value < 1)
