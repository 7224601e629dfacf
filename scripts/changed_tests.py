#!/usr/bin/env python3
"""Print the tests that guard what differs from `origin/main`, or from `main` where there is none, a line each.

Files that are not committed yet count as well. `scripts/test changed` runs the tests.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.source.guarding_tests import guards_of  # noqa: E402

BRANCHES = ("origin/main", "main")


def main() -> None:
    """Print the tests; nothing if no file differs."""
    branch = next(branch for branch in BRANCHES if _git("rev-parse", "--quiet", "--verify", branch, check=False))
    (base,) = _git("merge-base", "HEAD", branch)
    changed = [*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")]
    print(f"{len(changed)} files differ from {branch}.", file=sys.stderr)
    for test in guards_of(changed) if changed else []:
        print(f"tests/{test}")


def _git(*arguments: str, check: bool = True) -> list[str]:
    """Return the lines that a command of git prints."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout.splitlines()


if __name__ == "__main__":
    main()
