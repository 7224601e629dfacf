"""Settings files: pieces of YAML put where they do not belong."""

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
# What means something in YAML, or is a value that some reader of numbers, dates or texts may not take.
PIECES = [
    *"[]{}:,-?&*!|>'\"%@`#\t\0\n \\",
    *("&a ", "*a", "<<: *a\n", "- ", "? ", ": ", "!!python/object/apply:os.system [id]", "!!binary =", "!!set", "!x "),
    *("---\n", "...\n", "%YAML 9.9\n", "2024-13-45", "2001-12-14t21:59:43.10-25:00", "1e999", "-.inf", ".nan", "0x"),
    *("1_000", "190:20:30", "~", "yes", "=", "é", "\ud7ff", "\u2028", "\ufeff", "9" * 5000, "[" * 30, "- " * 30),
    *("{" * 200, "a: " * 50, "'" * 9, "|2-\n  x", ">\n", "lora:\n", "lora: {rank: 1}\n", "  rank: 8\n"),
]


def _rounds(directory: Path) -> Callable[[Generator], None]:
    path = directory / "run.yaml"

    def play_round(chance: Generator) -> None:
        text = FILE
        for place in sorted(chance.integers(len(FILE) + 1, size=chance.integers(1, 6)), reverse=True):
            text = text[:place] + PIECES[chance.integers(len(PIECES))] + text[place:]
        content = text.encode()
        path.write_bytes(damage(content, chance) if chance.random() < 0.2 else content)
        resolve(Sources(config=path), TrainSettings)

    return play_round


SETTINGS = Target(name="settings", prepare=_rounds, num_rounds=120)
