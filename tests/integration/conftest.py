"""A hub on loopback, and a fixture that finds models on it in processes of their own."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.runs.report import run_page
from tests.support.models.shallow_model import save_shallow
from tests.support.processes.forks import WITHOUT_CHARTS, output_of
from tests.support.processes.hub_server import COMMIT, OLD_COMMIT, Hub, Repo, serving


@dataclass
class FindResult:
    """The output of `tests.support.processes.find_model_process`."""

    events: list[dict[str, Any]]
    result: dict[str, Any]
    stderr: str

    @property
    def notes(self) -> list[str]:
        return [event["message"] for event in self.events if event["event"] == "Noted"]

    @property
    def downloads(self) -> list[tuple[int, int]]:
        return [(event["done_bytes"], event["total_bytes"]) for event in self.events if event["event"] == "BytesDone"]


Find = Callable[..., FindResult]


@pytest.fixture(scope="module", autouse=True)
def _pages_without_charts() -> Iterator[None]:
    """Leave the charts out of `report.html`: they take two fifths of the time of a run of three steps.

    Forked processes leave them out as well. Those of `tests/contract` draw them, and so does Python started anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_page, "drawn_charts", lambda _: [])
        patch.setenv(WITHOUT_CHARTS, "1")
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread: products of tiny models are too short to share, and waiting costs ten times as much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shallow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled trained model, but for two of its four layers: no test may change it."""
    return save_shallow(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def hub(base_model: Path) -> Iterator[Hub]:
    """A hub with `owner/tiny`: the bundled model, files of other formats, and an older commit."""
    files = {path.name: path.read_bytes() for path in base_model.iterdir()}
    files |= {"consolidated.safetensors": b"again", "original/model.safetensors": b"again", "modeling.py": b"bad()"}
    old = {**files, "generation_config.json": b'{"max_new_tokens": 7}'}
    repo = Repo(commits={COMMIT: files, OLD_COMMIT: old}, refs={"main": COMMIT, "v1": OLD_COMMIT})
    with serving(Hub(repos={"owner/tiny": repo})) as hub:
        yield hub


@pytest.fixture
def hub_env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return hub.environment(tmp_path / "hf-home")


@pytest.fixture
def find(hub_env: dict[str, str]) -> Find:
    """Find a model in a process of its own, which is forked unless its imports are what is tested."""

    def run(
        name: str, *waits: float, env: dict[str, str] = hub_env, is_forked: bool = True, **settings: object
    ) -> FindResult:
        environment = {**os.environ, **env}
        module, *arguments = find_command(name, *waits, **settings)
        code, stdout, stderr = output_of(arguments, environment, module=module, is_forked=is_forked)
        assert code == 0, stderr
        lines = [json.loads(line) for line in stdout.splitlines()]
        return FindResult(lines[:-1], lines[-1], stderr)

    return run


def find_command(name: str, *waits: float, **settings: object) -> list[str]:
    """Return the module that finds a model, and its arguments."""
    return ["tests.support.processes.find_model_process", json.dumps({"name": name, **settings}), *map(str, waits)]
