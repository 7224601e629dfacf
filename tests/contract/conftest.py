"""What tests of several commands share."""

from collections.abc import Iterator

import pytest

from tests.support.processes.light_commands import LightQlora, light_commands


@pytest.fixture(scope="session")
def light_qlora(_private_caches: None) -> Iterator[LightQlora]:
    """Run commands that end before torch is imported, each forked from a process without it."""
    with light_commands() as run:
        yield run
