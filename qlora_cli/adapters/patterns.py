"""Patterns in an adapter's config, tried on the names of its base before PEFT matches them."""

from collections.abc import Iterable
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, AdapterConfig, patterns_of
from qlora_cli.model_files.pattern_trial import MOST_SECONDS, find_fault

SHOWN_CHARACTERS = 80


def check_patterns(directory: Path, config: AdapterConfig, names: Iterable[str]) -> None:
    """Check that the patterns in the config of the adapter in `directory` are matched with `names` within seconds.

    Raises:
        ModelError: one is not; names the file, the key and the pattern.
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
