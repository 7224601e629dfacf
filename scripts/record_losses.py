"""Record the first losses of the demonstration with the installed versions, for tests to compare with.

Run it after a version was raised and its losses were reviewed: a file in tests/golden/losses means they are right.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.runs.demo_losses import first_losses, golden_file, versions  # noqa: E402


def main() -> None:
    """Train and write the file."""
    with tempfile.TemporaryDirectory() as scratch:
        losses = first_losses(Path(scratch) / "run")
    file = golden_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"versions": versions(), "losses": losses}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(losses)} losses in {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
