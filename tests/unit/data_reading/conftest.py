"""A directory of small files, as a data set."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def make_directory(tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a directory of files with these names, and returns its path."""

    def make(*names: str, card: str = "") -> str:
        for name in names:
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"text": "x"}\n')
        if card:
            (tmp_path / "set" / "README.md").write_text(card)
        return str(tmp_path / "set")

    return make
