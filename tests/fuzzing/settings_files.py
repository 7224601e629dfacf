"""Settings files with pieces of YAML where they do not belong."""

import re
from collections.abc import Callable
from pathlib import Path

from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.fuzzing.frame import Generator, Target, damage

FILE = """\
model:
  name: base
  rope_scaling: yarn:4
data:
  dataset: [rows.jsonl, "other.csv#5*2"]
  columns: {prompt: question, completion: reply}
output: {directory: run}
lora:
  rank: 8
  target_modules: [q_proj, v_proj]
  rank_pattern: {q_proj: 4}
training:
  learning_rate: 2e-4
  max_steps: 5
"""
# Text that means something in YAML, or is a value that some reader of numbers, dates or texts may not take.
PIECES = [
    *"[]{}:,-?&*!|>'\"%@`#\t\0\n \\",
    *("&a ", "*a", "<<: *a\n", "<<: {rank: 3}\n", "<<: [{rank: 3}, 1]\n", "<<: 1\n", "- ", "? ", ": ", "= ", "<< "),
    *("---\n", "...\n", "%YAML 9.9\n", "2024-13-45", "2001-12-14t21:59:43.10-25:00", "1e999", "-.inf", ".nan", "0x"),
    *("1_000", "190:20:30", "~", "yes", "=", "é", "\ud7ff", "\u2028", "\ufeff", "9" * 5000, "[" * 30, "- " * 30),
    *("{" * 200, "a: " * 50, "'" * 9, "|2-\n  x", ">\n", "lora:\n", "lora: {rank: 1}\n", "  rank: 8\n"),
]
# Tags put before a value, some with a value of their own, which fits the tag or does not.
TAGS = [
    *(
        "!x ",
        "! ",
        "!!x ",
        "!<tag:yaml.org,2002:int> ",
        "!<x> ",
        "!!python/object:os.system {}",
        "!!python/tuple [1, 2]",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system ",
        "!!python/object/new:type {args: [x, [], {}]}",
    ),
    *(
        "!!binary ",
        "!!binary aGk=",
        "!!binary |\n    é=\n",
        "!!set ",
        "!!set {a, b}",
        "!!set [a]",
        "!!omap ",
        "!!omap [a: 1]",
    ),
    *("!!omap [{a: 1, b: 2}]", "!!pairs [a: 1, a: 2]", "!!pairs {a: 1}", "!!timestamp 2001-12-14", "!!timestamp x"),
    *(
        "!!timestamp 2001-12-14t21:59:43.10-99:99",
        "!!int ",
        "!!int 0x",
        "!!int 0b2",
        "!!int -",
        "!!int 1:99:x",
        "!!float ",
    ),
    *(
        "!!float .",
        "!!float 1:x",
        "!!bool ",
        "!!bool maybe",
        "!!null ",
        "!!null {a: 1}",
        "!!str ",
        "!!str {a: 1}",
        "!!seq ",
    ),
    *(
        "!!seq {a: 1}",
        "!!map ",
        "!!map [a]",
        "!!map {[a]: 1, {b: c}: d}",
        "!!merge ",
        "!!value ",
        "!!yaml ",
        "&a [*a]",
        "&a {b: *a}",
    ),
]
VALUE_STARTS = [match.end() for match in re.finditer(r"[:,] |[\[{]", FILE)]


def _rounds(directory: Path) -> Callable[[Generator], None]:
    path = directory / "run.yaml"

    def play_round(chance: Generator) -> None:
        text = FILE
        for start in sorted(chance.choice(VALUE_STARTS, size=chance.integers(3)), reverse=True):
            text = text[:start] + TAGS[chance.integers(len(TAGS))] + text[start:]
        for start in sorted(chance.integers(len(text) + 1, size=chance.integers(4)), reverse=True):
            text = text[:start] + PIECES[chance.integers(len(PIECES))] + text[start:]
        content = text.encode()
        path.write_bytes(damage(content, chance) if chance.random() < 0.2 else content)
        resolve(Sources(config=path), TrainSettings)

    return play_round


SETTINGS = Target(name="settings", prepare=_rounds, num_rounds=1500)
