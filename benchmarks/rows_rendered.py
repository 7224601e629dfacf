"""Render random rows of every kind with each chat template of the tests, and count: accepted, noted, refused, lost.

    python benchmarks/rows_rendered.py [--rows 200]

The rows have system and developer prompts, reasoning under every key, tools, calls with arguments of every type, and
results. `noted` rows are accepted with a note on what the template leaves out. A row is lost if one of its values is
in neither the prompt nor a note, as `tests/unit/data_rows/test_dropped_values.py` checks; that is an error.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_cli.data.rows.examples import RowError
from qlora_cli.data.tokenizing.tokens import RowTokenizer
from qlora_cli.settings.choices import LossOn
from tests.chat_templates import TEMPLATES, tokenizer_with
from tests.support.data.drawn_rows import draw_row
from tests.unit.data_rows.test_dropped_values import lost, trained_texts


def outcomes(name: str, num_rows: int) -> Counter[str]:
    """Return the number of rows of each outcome with the template `name`."""
    text = tokenizer_with(name)
    counts: Counter[str] = Counter()
    for seed in range(num_rows):
        drawn = draw_row(seed)
        tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
        (tokenized,) = tokenizer.tokenize([drawn.conversation])
        if isinstance(tokenized, RowError):
            counts["refused"] += 1
            continue
        noted = set(tokenizer.renderer.num_dropped)
        trained = dict(zip(drawn.conversation.trained, trained_texts(text, tokenized), strict=True))
        missing = lost(drawn, str(text.tokenizer.decode(tokenized.input_ids.tolist())), trained)
        counts["lost" if missing - noted else "noted" if noted else "accepted"] += 1
    return counts


def main() -> int:
    """Print the counts of each template, and of all together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    num_rows = parser.parse_args().rows
    total: Counter[str] = Counter()
    for name in TEMPLATES:
        counts = outcomes(name, num_rows)
        total += counts
        print(json.dumps({"template": name, **counts}), flush=True)
    print(json.dumps({"templates": len(TEMPLATES), **total}))
    return 1 if total["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
