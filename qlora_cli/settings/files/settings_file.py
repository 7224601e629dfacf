"""Write settings as a file in YAML, in which a comment says where each value comes from."""

from collections.abc import Iterator, Mapping

import yaml

from qlora_cli.settings.models import SECTIONS
from qlora_cli.visible import visible


def settings_lines(values: Mapping[str, object], comments: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a settings file with `values`, plain ones by `section.key`, and their `comments`."""
    for section, model in SECTIONS.items():
        keys = [key for key in model.model_fields if f"{section}.{key}" in values]
        if keys:
            yield f"{section}:"
        for key in keys:
            path = f"{section}.{key}"
            comment = f"  # {in_one_line(comments[path])}" if path in comments else ""
            yield f"  {key}: {_inline(values[path])}{comment}"


def in_one_line(text: str) -> str:
    """Return text for a comment."""
    return visible(" ".join(text.split()), is_end=False)


def _inline(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
