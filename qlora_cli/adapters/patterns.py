"""Try the patterns in an adapter's config on the names of its base before PEFT matches them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from peft import LoraConfig

from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, AdapterConfig, patterns_of
from qlora_cli.model_files.pattern_trial import MOST_SECONDS, find_fault

Value = TypeVar("Value")

SHOWN_CHARACTERS = 80
MANY = 256  # `re` caches twice as many compiled patterns; beyond, it would recompile each for every name
NAME = re.compile(
    r"[\w.-]+"
)  # like most patterns; its dots match any character, so it matches only names of its own length


def check_patterns(directory: Path, config: AdapterConfig, names: Iterable[str]) -> None:
    """Check that the patterns in the config of the adapter in `directory` can be matched with `names` within seconds.

    Raises:
        ModelError: one can't; names the file, the key and the pattern.
    """
    fault = find_fault(patterns_of(config), names)
    if fault is None:
        return
    key, pattern = fault.pattern.key, fault.pattern.written
    shown = pattern if len(pattern) <= SHOWN_CHARACTERS else f"{pattern[:SHOWN_CHARACTERS]}…"
    reason = f"takes more than {MOST_SECONDS:g} seconds" if fault.reason is None else f"fails: {fault.reason}"
    raise ModelError(
        f"{directory / ADAPTER_CONFIG} can't be used: matching the pattern {shown!r} of {key} with the names in "
        f"its base {reason}",
        hint="Write it without repetitions within repetitions, or name the modules in a list.",
    )


def drop_unmatched(config: LoraConfig, names: Iterable[str]) -> None:
    """Drop patterns for ranks and scales that determine no value for `names`, if there are many.

    PEFT tries every pattern on every module. Thousands that match nothing would take minutes.
    """
    names = list(dict.fromkeys(names))
    config.rank_pattern = _deciding(config.rank_pattern or {}, names)
    config.alpha_pattern = _deciding(config.alpha_pattern or {}, names)


def _deciding(patterns: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """Return the patterns that are the first to match one of `names`, as PEFT's `get_pattern_key` matches."""
    if len(patterns) <= MANY:
        return dict(patterns)
    undecided = dict.fromkeys(names)
    by_length: dict[int, dict[str, None]] = defaultdict(dict)  # the names with a dotted suffix of this length
    for name in undecided:
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            by_length[len(name) - start][name] = None
    deciding: dict[str, Value] = {}
    for pattern, value in patterns.items():
        candidates = by_length.get(len(pattern), {}) if NAME.fullmatch(pattern) else undecided
        matches = re.compile(rf"(.*\.)?({pattern})$").match
        if decided := [name for name in candidates if name in undecided and matches(name)]:
            deciding[pattern] = value
            for name in decided:
                del undecided[name]
    return deciding
