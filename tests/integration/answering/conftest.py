"""The model that answers."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_model(shallow_base: Path) -> Path:
    """The first layers of the bundled model: no test may change it."""
    return shallow_base
