"""Patterns in an adapter's config, tried on the names of its base by a process that can be stopped.

PEFT matches them by `re`, which goes through every way in which a pattern can be read: one of twenty characters can
take longer on a name than anyone waits, and nothing stops it from within.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, AdapterConfig

MOST_SECONDS = 3.0  # for all patterns of a config on all names; a common one takes thousandths of a second
SHOWN_CHARACTERS = 80
# Names, a choice between names, or what ends with one of them, as most patterns are: there is little to go through.
PLAIN = re.compile(r"\^?(\.\*)?[^*+?{|()]*(\([^*+?{()]*\))?[^*+?{|()]*")
MOST_PLAIN_CHARACTERS = 300
TRIAL = """
import json, re, sys
asked = json.load(sys.stdin)
for number, pattern in enumerate(asked["patterns"]):
    print(number, flush=True)
    try:
        match = re.compile(pattern).match
    except re.error:
        continue
    for name in asked["names"]:
        match(name)
"""


def check_patterns(directory: Path, config: AdapterConfig, names: Iterable[str]) -> None:
    """Check that the patterns in the config of the adapter in `directory` are matched with `names` within seconds.

    Raises:
        ModelError: one is not; names the file, the key and the pattern.
    """
    found = [one for one in _as_matched(config) if not _is_plain(one[1])]
    if not found:
        return
    asked = {"patterns": [matched for _, _, matched in found], "names": list(dict.fromkeys(names))}
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        subprocess.run(  # noqa: S603 - this Python, with patterns and names as data
            command, input=json.dumps(asked).encode(), capture_output=True, timeout=MOST_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        begun = (error.stdout or b"0").split()
        key, pattern, _ = found[int(begun[-1])]
        shown = pattern if len(pattern) <= SHOWN_CHARACTERS else f"{pattern[:SHOWN_CHARACTERS]}…"
        raise ModelError(
            f"{directory / ADAPTER_CONFIG} can't be used: matching the pattern {shown!r} of {key} with the names in "
            f"its base takes more than {MOST_SECONDS:g} seconds",
            hint="Write it without repetitions within repetitions, or name the modules in a list.",
        ) from error


def _is_plain(pattern: str) -> bool:
    return len(pattern) <= MOST_PLAIN_CHARACTERS and PLAIN.fullmatch(pattern) is not None


def _as_matched(config: AdapterConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the patterns of a config: the key, the pattern, and what PEFT makes of it."""
    for key, whole in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(whole, str):
            yield key, whole, rf"(?:{whole})\Z"
    for key, ends in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for end in ends:
            yield key, end, rf"(.*\.)?({end})$"
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for layers in lists or ():
        yield "layers_pattern", layers, rf"(?:^|.*?\.){layers}\.(?P<idx>\d+)\."
    for module in config.modules_to_save or ():
        yield "modules_to_save", module, rf"(^|.*\.){module}($|\..*)"
