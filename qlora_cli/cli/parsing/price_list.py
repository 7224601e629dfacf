"""The prices of `qlora inspect-memory --prices FILE`: a YAML mapping of cards to the price of an hour."""

import math
from collections.abc import Iterator
from pathlib import Path

import yaml

from qlora_cli.errors import HardwareError, Problem, UsageError
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.settings.files.yaml_limits import MAX_BYTES, UNREADABLE, find_violation
from qlora_cli.units import format_bytes

EXAMPLE = "A line for each card, with the price of an hour: RTX 4090: 0.40"


def read_prices(path: Path, where: str) -> tuple[dict[str, float], list[Problem]]:
    """Return the price of an hour of each card by its name in the catalogue, and the problems found.

    `where` says where the file was named.
    """
    text = _read(path)
    if isinstance(text, Problem):
        return {}, [Problem(where=where, message=text.message, hint=text.hint)]
    if violation := find_violation(text):
        return {}, [Problem(where=f"{path}:{violation.line}", message=violation.message, hint=violation.hint)]
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UNREADABLE as error:
        reason = getattr(error, "problem", None) or str(error)
        return {}, [Problem(where=str(path), message=f"is not valid YAML: {reason}", hint=EXAMPLE)]
    if not isinstance(root, yaml.MappingNode) or not root.value:
        return {}, [Problem(where=str(path), message="has no prices", hint=EXAMPLE)]
    prices: dict[str, float] = {}
    problems = list(_read_lines(path, root, prices))
    return prices, problems


def _read(path: Path) -> str | Problem:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        return Problem(where="", message=f"{path}: {error.strerror or error}", hint=EXAMPLE)
    except UnicodeDecodeError as error:
        return Problem(where="", message=f"{path} is not UTF-8 text (byte {error.start})", hint=EXAMPLE)
    if len(raw) > MAX_BYTES:
        return Problem(where="", message=f"{path} is larger than {format_bytes(MAX_BYTES)}", hint=EXAMPLE)
    return text


def _read_lines(path: Path, root: yaml.MappingNode, prices: dict[str, float]) -> Iterator[Problem]:
    """Add the prices to `prices`, and yield the problems of each line."""
    for key, value in root.value:
        where, name = f"{path}:{key.start_mark.line + 1}", str(key.value)
        try:
            card = _card(name)
        except (UsageError, HardwareError) as error:
            yield Problem(where=where, message=error.message, hint=error.hint)
            continue
        if card.name in prices:
            yield Problem(where=where, message=f"{name!r}: the {card.name} has a price already", hint="Give one.")
        price = _price(value)
        if price is None:
            shown = value.value if isinstance(value, yaml.ScalarNode) else "a list or mapping"
            message = f"the price of the {card.name} must be a number above 0, got {shown!r}"
            yield Problem(where=where, message=message, hint=EXAMPLE)
            continue
        prices.setdefault(card.name, price)


def _card(name: str) -> Gpu:
    gpu = find_gpu(name)
    if gpu.card != gpu.name:
        hint = "Name one card of the catalogue, whose speed is known: qlora inspect-memory MODEL --gpu list"
        raise UsageError(f"{name!r} names no single card", hint=hint)
    return gpu


def _price(node: yaml.Node) -> float | None:
    try:
        price = float(node.value) if isinstance(node, yaml.ScalarNode) else 0.0
    except ValueError:
        return None
    return price if price > 0 and math.isfinite(price) else None
